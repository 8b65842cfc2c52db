"""Runs made from other runs: where their steps begin, whose batches they train on, what is copied."""

import tempfile
from dataclasses import replace
from pathlib import Path

from .checkpoints import (
    checkpoint_folder,
    commit_checkpoint,
    fetch_checkpoint,
    find_checkpoint,
    list_checkpoints,
    read_checkpoint,
    store_files,
    verify_checkpoint,
)
from .manifests import batch_steps, find_batch
from .objects import Store
from .refs import BatchRef, CheckpointRef, RunRef
from .runs import Origin, RunNotFound, read_run, run_ref


def origin_of(store: Store, run: RunRef) -> Origin | None:
    """Give the origin of a run; None where it began by itself or has no record."""
    try:
        return read_run(store, run.name).origin
    except RunNotFound:
        return None


def batch_home(store: Store, run: RunRef) -> RunRef:
    """Give the run that holds the batches of this one's steps: itself, unless it is a replay."""
    origin = origin_of(store, run)
    return run_ref(store, origin.batches) if origin and origin.batches else run


def log_batch(store: Store, run: RunRef, step: int) -> BatchRef | None:
    """Give the committed batch that a step of this run trains on, wherever it is kept."""
    ref = find_batch(store, batch_home(store, run), step)
    return replace(ref, run=run) if ref else None


def stored_batches(store: Store, run: RunRef, first: int, end: int | None) -> list[BatchRef]:
    """Give the committed batches of steps ``first`` to ``end - 1``, or to the last.

    Raises:
        ValueError: there is none, or one between is missing.
    """
    home = batch_home(store, run)
    refs = {step: find_batch(store, home, step) for step in batch_steps(store, home)}
    known = {step: ref for step, ref in refs.items() if ref}
    last = max(known, default=-1) + 1 if end is None else end
    missing = [step for step in range(first, last) if step not in known]
    if missing or first >= last:
        there = f"{min(known)} to {max(known)}" if known else "none"
        wanted = f"step {missing[0]}" if missing else f"any of steps {first}:{last}"
        raise ValueError(
            f"run {run.name!r} has no committed batch of {wanted}; it has steps {there}"
        )
    return [known[step] for step in range(first, last)]


def checkpoint_before(store: Store, run: RunRef, step: int) -> CheckpointRef | None:
    """Give the verified checkpoint from which ``step`` goes on; None for the run's first step.

    Raises:
        ValueError: there is no checkpoint of the step before.
        ManifestError: a file of it is not as it was written.
    """
    origin = origin_of(store, run)
    if step == 0 and not (origin and origin.first_step):
        return None
    ref = find_checkpoint(store, run, step - 1)
    if ref is None:
        known = ", ".join(str(c.step) for c in list_checkpoints(store, run)) or "none"
        raise ValueError(
            f"run {run.name!r} has no checkpoint of step {step - 1}, which step {step} goes on from; "
            f"it has those of steps {known}"
        )
    verify_checkpoint(store, ref)
    return ref


def copy_checkpoint(store: Store, ref: CheckpointRef, run: RunRef) -> CheckpointRef:
    """Copy a checkpoint into another run of the store, verified on the way."""
    record = read_checkpoint(store, ref.url)
    names = [file["name"] for file in record["files"]]
    with tempfile.TemporaryDirectory(prefix="rollflow-checkpoint-") as staging:
        folder = fetch_checkpoint(store, ref, Path(staging))
        files = store_files(store, checkpoint_folder(run, ref.step), folder, names)
    return commit_checkpoint(
        store, run, ref.step, ref.weights_digest, files, record.get("details", {})
    )


def clear_unborn(store: Store, run: RunRef) -> None:
    """Delete what an interrupted derivation left of a run that has no record: it does not exist."""
    if not store.exists(f"{run.url}/run.json"):
        for url in store.list(f"{run.url}/checkpoints"):
            store.delete(url)
