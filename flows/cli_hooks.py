"""``rollflow hooks check``: does a function of yours fit, and what is it given?"""

import inspect

from cyclopts import App
from rich.console import Console
from rich.markup import escape
from rich.table import Table

app = App(name="hooks", help="Functions of your own.")


@app.command(name="check")
def check(path: str, kind: str = "") -> None:
    """Load a function, see which hook it can be, and call it with an example.

    Parameters
    ----------
    path
        pkg.mod:fn
    kind
        the hook it is meant to be; all that fit are named unless given.
    """
    from rollflow.tasks.hooks import check_hook

    console = Console(soft_wrap=True)
    verdicts = check_hook(path, kind or None)
    for verdict in verdicts:
        said = escape(f"{verdict.called_as}; gave {verdict.gave}")
        console.print(f"[green]{verdict.kind}[/]: {said}")


@app.command(name="ls")
def list_hooks() -> None:
    """List the hooks, the setting of each and how its function looks."""
    from rollflow.tasks.hooks import HOOKS

    table = Table("hook", "setting", "function")
    for name, (setting, example) in HOOKS.items():
        table.add_row(name, setting, escape(inspect.cleandoc(example)))
    Console(soft_wrap=True).print(table)
