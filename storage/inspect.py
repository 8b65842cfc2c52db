"""What a person wants to see of a store, as plain rows; printing is somebody else's."""

from typing import Any

from .checkpoints import newest_checkpoint
from .manifests import batch_steps, find_batch, read_batch
from .objects import Store
from .refs import BatchRef, RunRef
from .runs import list_runs
from .samples import Sample
from .steps import last_step


def run_rows(store: Store) -> list[dict[str, Any]]:
    """Give one row a run, oldest first.

    Columns: name, created_at, steps (committed), checkpoint (newest step, or None), reward (of the
    newest step, or None), code_revision, url.
    """
    rows: list[dict[str, Any]] = []
    for record in list_runs(store):
        last = last_step(store, record.ref)
        checkpoint = newest_checkpoint(store, record.ref)
        rows.append(
            {
                "name": record.ref.name,
                "created_at": record.created_at,
                "steps": last.step + 1 if last else 0,
                "checkpoint": checkpoint.step if checkpoint else None,
                "reward": last.metrics.get("rollout/reward") if last else None,
                "code_revision": record.code_revision,
                "url": record.ref.url,
            }
        )
    return rows


def batch_rows(
    store: Store, run: RunRef, dataset: str | None = None, newest: int | None = None
) -> list[dict[str, Any]]:
    """Give one row a batch of the run (or of its evaluation on ``dataset``), in order of step.

    Columns: step, committed, rows, groups, digest, metrics, url; only the ``newest`` so many. A
    folder without a manifest is shown with ``committed`` False and nothing else.
    """
    steps = batch_steps(store, run, dataset)
    return [_batch_row(s, find_batch(store, run, s, dataset)) for s in steps[-(newest or 0) :]]


def batch_samples(
    store: Store, run: RunRef, step: int | None = None, dataset: str | None = None
) -> list[Sample]:
    """Read a step's samples, verified; of the newest committed step unless one is given.

    ValueError where there is no such batch.
    """
    steps = batch_steps(store, run, dataset) if step is None else [step]
    for number in reversed(steps):
        if ref := find_batch(store, run, number, dataset):
            return read_batch(store, ref)
    wanted = "no committed batch" if step is None else f"no committed batch of step {step}"
    known = batch_steps(store, run, dataset)
    raise ValueError(f"run {run.name!r} has {wanted}; it has folders of steps {known}")


def _batch_row(step: int, ref: BatchRef | None) -> dict[str, Any]:
    if ref is None:
        return {"step": step, "committed": False}
    return {
        "step": step,
        "committed": True,
        "rows": ref.rows,
        "groups": ref.groups,
        "digest": ref.digest,
        "metrics": ref.metrics,
        "url": ref.url,
    }
