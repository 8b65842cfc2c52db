"""What a recomputation of a run reads, and how it compares."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from rollflow.storage.checkpoints import list_checkpoints
from rollflow.storage.config import StoreConfig
from rollflow.storage.objects import Store
from rollflow.storage.origins import log_batch
from rollflow.storage.refs import BatchRef, CheckpointRef, RunRef
from rollflow.storage.runs import read_run
from rollflow.storage.steps import StepRecord, read_step_records

from .preflight import RunPlan


@dataclass(frozen=True, slots=True)
class LogEntry:
    """One committed step: its batch, its record, and the checkpoint taken after it."""

    batch: BatchRef
    record: StepRecord
    checkpoint: CheckpointRef | None

    @property
    def step(self) -> int:
        """Which step it is."""
        return self.record.ref.step


@dataclass(slots=True)
class Stretch:
    """Steps that were computed on one layout, and what they were computed from.

    Where a run went on on other ranks, it began at a checkpoint, and steps that were committed
    before were done again without being committed anew.
    """

    layout: dict[str, int]
    checkpoint: CheckpointRef | None
    """Where the trainer started; None for the run's first weights."""
    entries: list[LogEntry] = field(default_factory=list)
    """Everything that was trained, in order."""
    own: set[int] = field(default_factory=set)
    """The steps of ``entries`` whose records this stretch wrote."""

    def settings(self, log: "Log") -> dict[str, Any]:
        """The run's settings with this stretch's ranks and parallel sizes."""
        sizes = {k: v for k, v in self.layout.items() if k != "ranks"}
        ranks = self.layout.get("ranks", log.settings["trainer"]["ranks"])
        return {
            **log.settings,
            "trainer": {**log.settings["trainer"], "ranks": ranks},
            "megatron": {**log.settings["megatron"], **sizes},
        }


@dataclass(frozen=True, slots=True)
class Log:
    """A run's log, with the settings that decide what it means."""

    settings: dict[str, Any]
    """As ``RunConfig`` takes them."""
    entries: list[LogEntry]
    checkpoints: Mapping[int, CheckpointRef]

    def stretches(self) -> list[Stretch]:
        """The run cut where its layout changed, oldest first.

        Raises:
            ValueError: the checkpoint that a stretch started from is not in the store any more.
        """
        found: list[Stretch] = []
        for entry in self.entries:
            if not found or found[-1].layout != entry.record.layout:
                found.append(self._stretch(entry))
            found[-1].entries.append(entry)
            found[-1].own.add(entry.step)
        return found

    def _stretch(self, first: LogEntry) -> Stretch:
        origin = first.record.restored_step if first.step else -1
        checkpoint = self.checkpoints.get(origin)
        if origin >= 0 and checkpoint is None:
            raise ValueError(
                f"step {first.step} was trained on another layout from the checkpoint of step {origin}, "
                "which is not in the store any more; its weights cannot be computed again"
            )
        again = [e for e in self.entries if origin < e.step < first.step]
        return Stretch(first.record.layout, checkpoint, again)


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
    records = read_step_records(opened, run.ref)
    settings = {**run.settings, "store": store.model_dump()}
    entries = [_entry(opened, run.ref, r, checkpoints.get(r.ref.step)) for r in records]
    return Log(settings, entries, checkpoints)


def _entry(
    store: Store, run: RunRef, record: StepRecord, checkpoint: CheckpointRef | None
) -> LogEntry:
    step, digest = record.ref.step, record.ref.batch_digest
    batch = log_batch(store, run, step)
    if batch is None or batch.digest != digest:
        found = batch.digest if batch else "no committed batch"
        raise ValueError(
            f"step {step} of run {run.name!r} was trained on batch {digest}; the store has {found}"
        )
    return LogEntry(batch, record, checkpoint)


def scratch_plan(store: StoreConfig, name: str, stretch: Stretch) -> RunPlan:
    """A plan that starts where the stretch did, under a name of its own and writing nothing."""
    scratch = f"{name}.recompute"
    first = stretch.checkpoint.step + 1 if stretch.checkpoint else 0
    return RunPlan(RunRef(scratch, Store(store).run_url(scratch)), first, stretch.checkpoint)


def compare(log: Log, recomputed: list[tuple[Stretch, dict[int, str]]]) -> list[Difference]:
    """Differences between recomputed weights, by step of each stretch, and what the log says.

    A step's record must be as its own stretch computes it; a checkpoint as any that did its step.
    """
    differences: list[Difference] = []
    for stretch, digests in recomputed:
        for entry in (e for e in stretch.entries if e.step in stretch.own):
            said, found = entry.record.ref.weights_digest, digests[entry.step]
            if said != found:
                differences.append(Difference(f"step {entry.step}", said, found))
    for entry in (e for e in log.entries if e.checkpoint):
        assert entry.checkpoint is not None
        said = entry.checkpoint.weights_digest
        found = [digests[entry.step] for _, digests in recomputed if entry.step in digests]
        if said not in found:
            what = f"checkpoint of step {entry.step}"
            differences.append(Difference(what, said, ", ".join(dict.fromkeys(found))))
    return differences
