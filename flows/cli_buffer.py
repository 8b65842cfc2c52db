"""``rollflow buffer``: what waits in a run's data buffer."""

from cyclopts import App
from rich.console import Console
from rich.table import Table

from rollflow.storage.buffer import stored_state
from rollflow.storage.config import StoreConfig
from rollflow.storage.objects import Store
from rollflow.storage.runs import open_run

app = App(name="buffer", help="The data buffer of a run.")


@app.command(name="show")
def show(run: str, store: str = ".rollflow/store", limit: int = 20) -> None:
    """Show how far each source was drawn, and which groups wait to go on.

    Parameters
    ----------
    run
        name of the run.
    store
        store that holds the runs: any fsspec URL.
    limit
        how many waiting groups.
    """
    opened = Store(StoreConfig(url=store))
    state = stored_state(opened, open_run(opened, run))
    console = Console(soft_wrap=True)
    for source, drawn in sorted(state.cursors.items()):
        console.print(f"{source}: {drawn} prompts drawn")
    for reason, count in sorted(state.dropped.items()):
        console.print(f"{count} groups not continued: {reason}")
    console.print(f"{len(state.kept)} groups wait")
    if not state.kept:
        return
    table = Table("group", "prompt", "oldest version", "why")
    for kept in state.kept[:limit]:
        version = "-" if kept.oldest_version is None else str(kept.oldest_version)
        table.add_row(kept.group_id, kept.prompt_id, version, kept.reason)
    console.print(table)
