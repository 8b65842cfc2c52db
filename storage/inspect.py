"""What a person wants to see of a store, as plain rows; printing is somebody else's."""

from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from .checkpoints import newest_checkpoint
from .manifests import batch_steps, find_batch, manifest_parts, read_batch, read_manifest
from .objects import Store
from .origins import batch_home
from .query import reader
from .refs import BatchRef, RunRef
from .retention import removed_digest
from .runs import list_runs
from .samples import Sample
from .schema import SCHEMA, from_table
from .shards import read_part
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
    folder without a manifest is shown with ``committed`` False and nothing else but ``removed``,
    where ``gc`` took it.
    """
    run = batch_home(store, run)
    steps = batch_steps(store, run, dataset)
    rows = [_batch_row(s, find_batch(store, run, s, dataset)) for s in steps[-(newest or 0) :]]
    for row in rows:
        if not row["committed"] and dataset is None and removed_digest(store, run, row["step"]):
            row["removed"] = True
    return rows


def batch_samples(
    store: Store, run: RunRef, step: int | None = None, dataset: str | None = None
) -> list[Sample]:
    """Read a step's samples, verified; of the newest committed step unless one is given.

    ValueError where there is no such batch.
    """
    run = batch_home(store, run)
    steps = batch_steps(store, run, dataset) if step is None else [step]
    for number in reversed(steps):
        if ref := find_batch(store, run, number, dataset):
            return read_batch(store, ref)
    wanted = "no committed batch" if step is None else f"no committed batch of step {step}"
    known = batch_steps(store, run, dataset)
    raise ValueError(f"run {run.name!r} has {wanted}; it has folders of steps {known}")


def find_sample(store: Store, run: RunRef, sample_id: str, dataset: str | None = None) -> Sample:
    """Read one sample of a run, its part verified. ValueError where there is none of that id."""
    group_id, _, index = sample_id.rpartition("#")
    if not group_id or not index.isdigit():
        raise ValueError(f"sample {sample_id!r}: ids look like '000012/train.jsonl:7#3'")
    run = batch_home(store, run)
    own = group_id.partition("/")[0]
    steps = batch_steps(store, run, dataset)
    likely = [int(own)] if own.isdigit() and int(own) in steps else []
    is_it = (pc.field("group_id") == group_id) & (pc.field("index") == int(index))
    for step in [*likely, *(s for s in reversed(steps) if s not in likely)]:
        if (ref := find_batch(store, run, step, dataset)) is None:
            continue
        for part in manifest_parts(read_manifest(store, ref.url)):
            if (found := read_part(store, ref.url, part).filter(is_it)).num_rows:
                return from_table(found)[0]
    raise ValueError(f"run {run.name!r} has no sample {sample_id!r}")


def sample_rows(
    store: Store,
    run: RunRef,
    where: str,
    parameters: Sequence[Any] = (),
    limit: int | None = None,
) -> pa.RecordBatchReader:
    """Give all columns of the samples that an SQL condition holds for, in order, batch by batch."""
    columns = ", ".join(f'"{name}"' for name in SCHEMA.names)
    cut = "" if limit is None else f" LIMIT {int(limit)}"
    text = f'SELECT {columns} FROM samples WHERE {where} ORDER BY step, group_id, "index"{cut}'
    return reader(store, run, text, parameters)


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
