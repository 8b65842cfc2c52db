"""What a recomputation of a run reads, and how it compares."""

from dataclasses import dataclass
from typing import Any

from rollflow.storage.checkpoints import list_checkpoints
from rollflow.storage.config import StoreConfig
from rollflow.storage.manifests import find_batch
from rollflow.storage.objects import Store
from rollflow.storage.refs import BatchRef, CheckpointRef, RunRef, StepRef
from rollflow.storage.runs import read_run
from rollflow.storage.steps import read_steps

from .preflight import RunPlan


@dataclass(frozen=True, slots=True)
class LogEntry:
    """One committed step: its batch, its record, and the checkpoint taken after it."""

    batch: BatchRef
    record: StepRef
    checkpoint: CheckpointRef | None


@dataclass(frozen=True, slots=True)
class Log:
    """A run's log, with the settings that decide what it means."""

    settings: dict[str, Any]
    """As ``RunConfig`` takes them."""
    entries: list[LogEntry]


@dataclass(frozen=True, slots=True)
class Difference:
    """Weights that did not come out as the log says."""

    what: str
    """``step 12`` or ``checkpoint of step 12``."""
    expected: str
    found: str

    def __str__(self) -> str:
        return f"{self.what}: weights {self.expected} in the log, {self.found} recomputed"


def read_log(store: StoreConfig, name: str) -> Log:
    """Read the committed steps of a run.

    Raises:
        ValueError: there is no such run.
        ManifestError: a step's batch is missing or is not the one that its record names.
    """
    opened = Store(store)
    run = read_run(opened, name)
    checkpoints = {c.step: c for c in list_checkpoints(opened, run.ref)}
    records = read_steps(opened, run.ref)
    settings = {**run.free, **run.config, "store": store.model_dump()}
    return Log(settings, [_entry(opened, run.ref, r, checkpoints.get(r.step)) for r in records])


def _entry(
    store: Store, run: RunRef, record: StepRef, checkpoint: CheckpointRef | None
) -> LogEntry:
    batch = find_batch(store, run, record.step)
    if batch is None or batch.digest != record.batch_digest:
        found = batch.digest if batch else "no committed batch"
        raise ValueError(
            f"step {record.step} of run {run.name!r} was trained on batch {record.batch_digest}; the store has {found}"
        )
    return LogEntry(batch, record, checkpoint)


def scratch_plan(store: StoreConfig, name: str) -> RunPlan:
    """A plan that starts at the run's first weights, under a name of its own and writing nothing."""
    scratch = f"{name}.recompute"
    return RunPlan(RunRef(scratch, Store(store).run_url(scratch)), 0, None)


def compare(entry: LogEntry, weights_digest: str) -> list[Difference]:
    """Differences between recomputed weights and what the log says of them."""
    said = [(f"step {entry.record.step}", entry.record.weights_digest)]
    if entry.checkpoint:
        said.append((f"checkpoint of step {entry.record.step}", entry.checkpoint.weights_digest))
    return [
        Difference(what, digest, weights_digest)
        for what, digest in said
        if digest != weights_digest
    ]
