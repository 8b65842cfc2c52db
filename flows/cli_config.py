"""``rollflow config``: what settings there are, what they mean and where two runs differ."""

import json
from pathlib import Path

from cyclopts import App
from rich.table import Table
from rich.text import Text

from .terminal import DEFAULT_STORE, StoreUrl, Words, console

config = App(name="config", help="Settings: what there is, what it means, what differs.")


@config.command
def schema() -> None:
    """Print the JSON schema of a settings file."""
    from .settings_reference import schema as make

    console.print_json(json.dumps(make(), default=str))


@config.command
def explain(name: str) -> None:
    """Say what a setting is.

    Parameters
    ----------
    name
        as in a file (trainer.ranks) or as a word (tensor-model-parallel-size, sglang-tp-size).
    """
    from .settings_reference import explain as find

    entry = find(name)
    console.print(Text(f"{entry.name}   {entry.word}", style="bold"))
    console.print(Text(f"type {entry.type}, default {entry.default or 'none: it has to be given'}"))
    if entry.owned:
        console.print(Text(f"set by rollflow: {entry.owned}"))
    if entry.help:
        console.print(Text(entry.help))


@config.command(name="diff")
def show_diff(a: str, b: str, store: StoreUrl = DEFAULT_STORE) -> None:
    """List the settings in which two runs, files or recipes differ.

    Parameters
    ----------
    a
        a TOML file, the name of a recipe, or the name of a run in the store.
    b
        the other one.
    """
    from .settings_reference import diff

    table = Table("setting", a, b)
    for row in diff(_tree(a, store), _tree(b, store)):
        table.add_row(*(Text(cell) for cell in row))
    console.print(table if table.row_count else "no difference")


@config.command(name="from-slime")
def translate(*words: Words) -> None:
    """Translate the arguments of a slime launch script into a settings file.

    The file goes to stdout; what has no counterpart stands in its comments.

    Parameters
    ----------
    words
        the script's arguments, as they are.
    """
    from .arguments import build_config
    from .from_slime import from_slime, to_toml

    found = from_slime(words)
    for word, why in sorted(found.missing.items()):
        print(f"# not translated: --{word}: {why}")
    for word, why in sorted(found.implied.items()):
        print(f"# no word of its own: --{word}: {why}")
    try:
        build_config(found.tree)
    except ValueError as error:
        for line in str(error).splitlines():
            print(f"# to be mended: {line}")
    print(to_toml(found.tree), end="")


@config.command
def reference(folder: Path = Path("flows/reference")) -> None:
    """Write a reference page for each class of settings.

    Parameters
    ----------
    folder
        where to write them.
    """
    from .settings_reference import PASSED_ON, page

    folder.mkdir(parents=True, exist_ok=True)
    for table in ("rollflow", *PASSED_ON):
        (folder / f"{table}.md").write_text(page(table))
        console.print(f"{folder / table}.md")


def _tree(name: str, store: str) -> dict:
    from .arguments import build_config, load_config, recipes, stored_settings

    if name in recipes() or Path(name).is_file():
        return load_config(recipes().get(name, name)).model_dump(mode="json")
    return build_config(stored_settings(store, name)).model_dump(mode="json")
