"""Commands that look into runs, and the one that tidies them up."""

from pathlib import Path

from cyclopts import App

from rollflow.storage.samples import Status

from .terminal import DEFAULT_STORE, StoreUrl, console


def register(app: App) -> None:
    """Add the commands to the ``rollflow`` command."""
    for command in (runs, rollouts, lineage, gc):
        app.command(command)


runs = App(name="runs", help="The runs in a store.")
rollouts = App(name="rollouts", help="The samples that a run stored.")


@runs.command(name="ls")
def list_runs(store: StoreUrl = DEFAULT_STORE) -> None:
    """List runs with their steps, checkpoints and last reward."""
    from .show import print_runs

    print_runs(store, console)


@runs.command(name="show")
def show_run(run: str, store: StoreUrl = DEFAULT_STORE) -> None:
    """Show what a run is, how far it has come and what it holds.

    Parameters
    ----------
    run
        name of the run.
    """
    from .look import print_run

    print_run(store, run)


@runs.command(name="compact")
def compact_run(run: str, store: StoreUrl = DEFAULT_STORE, before: int | None = None) -> None:
    """Write old steps once more as Parquet, which queries read faster. The log stays as it is.

    Parameters
    ----------
    run
        name of the run.
    before
        only steps below this one.
    """
    from .look import print_compaction

    print_compaction(store, run, before)


@rollouts.command(name="ls")
def list_rollouts(run: str, store: StoreUrl = DEFAULT_STORE, steps: int = 20) -> None:
    """List a run's batches.

    Parameters
    ----------
    run
        name of the run.
    steps
        how many of the newest steps.
    """
    from .show import print_batches

    print_batches(store, run, steps, console)


@rollouts.command(name="show")
def show_rollouts(
    run: str,
    store: StoreUrl = DEFAULT_STORE,
    step: int | None = None,
    sample: str | None = None,
    min_reward: float | None = None,
    max_reward: float | None = None,
    status: Status | None = None,
    prompt: str | None = None,
    limit: int = 10,
) -> None:
    """Print stored samples: prompt, answer, reward and what produced them.

    Parameters
    ----------
    run
        name of the run.
    step
        the step; the newest unless given, or all steps with one of the filters below.
    sample
        one sample's id, shown token by token.
    min_reward
        only rewards of at least this.
    max_reward
        only rewards of at most this.
    status
        only samples that ended so.
    prompt
        only answers to the prompt of this id.
    limit
        how many samples.
    """
    from .show import print_filtered, print_sample, print_samples

    if sample is not None:
        print_sample(store, run, sample, console)
    elif (min_reward, max_reward, status, prompt) == (None, None, None, None):
        print_samples(store, run, step, limit, console)
    else:
        from .look import filtered

        found = filtered(store, run, step, min_reward, max_reward, status, prompt, limit)
        print_filtered(found, console)


@rollouts.command(name="sql")
def sql_rollouts(
    run: str,
    query: str,
    store: StoreUrl = DEFAULT_STORE,
    format: str = "table",
    limit: int = 100,
) -> None:
    """Ask a run in SQL (DuckDB), also while it goes on.

    Views: samples, evals, batches, steps, metrics, checkpoints; storage/README.md has the columns.
    Example: "select step, avg(reward) from samples group by 1 order by 1".

    Parameters
    ----------
    run
        name of the run.
    query
        the query.
    format
        table, csv or json (a line a row).
    limit
        most rows of a table.
    """
    from .look import print_query

    if format not in ("table", "csv", "json"):
        raise ValueError(f"--format {format}: use table, csv or json")
    print_query(store, run, query, format, limit)


@rollouts.command(name="diff")
def diff_rollouts(
    run: str,
    other: str,
    store: StoreUrl = DEFAULT_STORE,
    other_store: str = "",
    step: int | None = None,
    limit: int = 20,
) -> None:
    """Compare the samples that two runs have under the same id: rewards, graders, answers.

    Parameters
    ----------
    run
        name of a run.
    other
        name of the other, e.g. one that was scored again.
    other_store
        store of the other; the same unless given.
    step
        only this step.
    limit
        how many samples to show, those whose rewards differ most first.
    """
    from .look import print_difference

    print_difference(store, run, other, other_store, step, limit)


@rollouts.command(name="export")
def export_rollouts(
    run: str, target: Path, store: StoreUrl = DEFAULT_STORE, where: str = "true"
) -> None:
    """Write samples to a file: .jsonl, .parquet, .arrow, or .csv without tokens.

    Parameters
    ----------
    run
        name of the run.
    target
        the file.
    where
        an SQL condition on the samples, e.g. "reward > 0.5 and step between 10 and 20".
    """
    from .look import export

    console.print(f"{export(store, run, target, where)} samples written to {target}")


def lineage(run: str, target: str, ids: bool = False, store: StoreUrl = DEFAULT_STORE) -> None:
    """Tell what a checkpoint was trained on, or where a sample came from and what it did.

    Parameters
    ----------
    run
        name of the run.
    target
        a checkpoint, such as step-000010, or a sample's id, such as 000010/train.jsonl:7#3.
    ids
        of a checkpoint, list every sample that it was trained on: run, step and id, a line each.
    """
    from .lineage import print_lineage

    print_lineage(store, run, target, ids)


def gc(
    run: str,
    keep: int = 1,
    rollouts: bool = False,
    dry_run: bool = False,
    store: StoreUrl = DEFAULT_STORE,
) -> None:
    """Remove superseded checkpoints, and leftovers of writers that were killed.

    Parameters
    ----------
    run
        name of the run.
    keep
        how many of the newest whole checkpoints stay.
    rollouts
        also remove batches that a kept checkpoint makes needless for going on. Replay, scoring again and audits by recomputation need them.
    dry_run
        only list what would go.
    """
    from .gc import collect_garbage

    collect_garbage(store, run, keep, rollouts, dry_run)
