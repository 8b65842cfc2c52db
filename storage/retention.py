"""What a run does not need any more, and its removal. Nothing that a live record names is touched."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime

from .checkpoints import delete_checkpoint, list_checkpoints, verify_checkpoint
from .integrity import ManifestError, Record, seal, unseal
from .lease import check_fence
from .manifests import batch_folder, batch_steps, find_batch
from .objects import Store
from .refs import BatchRef, CheckpointRef, RunRef
from .runs import list_runs
from .shards import MANIFEST
from .steps import read_step, step_numbers

FORMAT = "rollflow.removed/1"
REMOVED = "removed.json"
"""Stands in place of a batch that was removed: its digest, rows and groups."""


@dataclass(frozen=True, slots=True)
class Garbage:
    """What may go, and what has to stay although it is old, with the reason."""

    checkpoints: list[CheckpointRef] = field(default_factory=list)
    batches: list[BatchRef] = field(default_factory=list)
    kept: dict[str, str] = field(default_factory=dict)
    """Why an older object stays, by URL."""


def find_garbage(store: Store, run: RunRef, keep: int = 1, rollouts: bool = False) -> Garbage:
    """Find what can be removed of a run: superseded checkpoints and, if asked, redone rollouts.

    The newest ``keep`` checkpoints of which every byte is as written stay, and the newest of all.
    A batch can go once its step is committed, a verified checkpoint that stays holds what it taught,
    and no other run trains on it (a replay names the run whose batches it uses).

    Raises:
        ValueError: ``keep`` is less than 1.
    """
    if keep < 1:
        raise ValueError(f"keep is {keep}; at least the newest checkpoint stays, so give 1 or more")
    garbage = Garbage()
    checkpoints = list_checkpoints(store, run)
    whole: list[CheckpointRef] = []
    for ref in reversed(checkpoints):
        if len(whole) == keep:
            garbage.checkpoints.insert(0, ref)
        elif _is_whole(store, ref):
            whole.append(ref)
        else:
            garbage.kept[ref.url] = "damaged, and no newer one was found whole"
    if rollouts:
        _find_batches(store, run, whole, garbage)
    return garbage


def remove(store: Store, run: RunRef, garbage: Garbage) -> None:
    """Remove what was found; each thing first by its manifest, so that half of it never exists.

    A removed batch leaves its name, so that an audit can tell it from a lost one. LeaseLostError
    where the epoch of ``run`` is over.
    """
    for ref in garbage.batches:
        _remove_batch(store, run, ref)
    for ref in garbage.checkpoints:
        delete_checkpoint(store, CheckpointRef(run, ref.step, ref.url, ref.weights_digest))


def removed_digest(store: Store, run: RunRef, step: int) -> str | None:
    """Give the digest of a batch that was removed; None where none was."""
    url = f"{batch_folder(run, step)}/{REMOVED}"
    try:
        record = unseal(store.get(url), url, FORMAT)
    except FileNotFoundError:
        return None
    if (record["run"], record["step"]) != (run.name, step):
        raise ManifestError(url, "the removal of that batch", f"of step {record['step']}")
    return record["digest"]


def _find_batches(
    store: Store, run: RunRef, whole: Sequence[CheckpointRef], garbage: Garbage
) -> None:
    """Batches up to the oldest checkpoint that stays: from any of those the run can go on."""
    users = [r.ref.name for r in list_runs(store) if r.origin and r.origin.batches == run.name]
    done = set(step_numbers(store, run))
    limit = min((ref.step for ref in whole), default=-1)
    for step in batch_steps(store, run):
        ref = find_batch(store, run, step)
        if ref is None or step > limit:
            continue
        if users:
            garbage.kept[ref.url] = f"run {users[0]!r} trains on it"
        elif step not in done or read_step(store, run, step).ref.batch_digest != ref.digest:
            garbage.kept[ref.url] = "no committed step names it"
        else:
            garbage.batches.append(ref)


def _remove_batch(store: Store, run: RunRef, ref: BatchRef) -> None:
    record: Record = {
        "format": FORMAT,
        "run": run.name,
        "step": ref.step,
        "digest": ref.digest,
        "rows": ref.rows,
        "groups": ref.groups,
        "removed_at": datetime.now(UTC).isoformat(timespec="milliseconds"),
    }
    folder = batch_folder(run, ref.step)
    check_fence(store, run)
    store.put_atomic(f"{folder}/{REMOVED}", seal(record))
    store.delete(f"{folder}/{MANIFEST}")
    for url in store.list(folder):
        if not url.endswith((f"/{REMOVED}", ".json")):
            store.delete(url)


def _is_whole(store: Store, ref: CheckpointRef) -> bool:
    try:
        verify_checkpoint(store, ref)
    except ManifestError:
        return False
    return True
