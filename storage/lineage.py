"""From a checkpoint back to every batch that made it, through forks and replays."""

from collections.abc import Iterator
from dataclasses import dataclass

from .checkpoints import find_checkpoint
from .integrity import ManifestError
from .manifests import read_batch
from .objects import Store
from .origins import log_batch, origin_of
from .refs import BatchRef, RunRef
from .runs import open_run
from .samples import Sample
from .steps import StepRecord, read_step


@dataclass(frozen=True, slots=True)
class TrainedStep:
    """A step that went into a checkpoint."""

    run: RunRef
    """The run whose step it is: an ancestor's, where the checkpoint is of a fork."""
    record: StepRecord
    batch: BatchRef


def trained_steps(store: Store, run: RunRef, step: int) -> list[TrainedStep]:
    """Give every step that went into the checkpoint after ``step``, the oldest first.

    Raises:
        ValueError: the run has no such checkpoint.
        ManifestError: a record or batch on the way is missing or is not the one that was trained on,
            or the weights of the checkpoint are not those of its step.
    """
    checkpoint = find_checkpoint(store, run, step)
    if checkpoint is None:
        raise ValueError(f"run {run.name!r} has no checkpoint of step {step}")
    origin = origin_of(store, run)
    first = origin.first_step if origin else 0
    before: list[TrainedStep] = []
    if origin and first:
        before = trained_steps(store, open_run(store, origin.run), first - 1)
    own = [_trained(store, run, number) for number in range(first, step + 1)]
    steps = before + own
    if steps and steps[-1].record.ref.weights_digest != checkpoint.weights_digest:
        said = steps[-1].record.ref.weights_digest
        raise ManifestError(
            checkpoint.url, f"weights {said} of its step", checkpoint.weights_digest
        )
    return steps


def samples_of(store: Store, step: TrainedStep) -> Iterator[Sample]:
    """Give the samples of a step's batch, verified, in order."""
    yield from read_batch(store, step.batch)


def _trained(store: Store, run: RunRef, step: int) -> TrainedStep:
    record = read_step(store, run, step)
    batch = log_batch(store, run, step)
    found = batch.digest if batch else "no committed batch"
    if batch is None or batch.digest != record.ref.batch_digest:
        raise ManifestError(record.ref.url, f"batch {record.ref.batch_digest}", found)
    return TrainedStep(run, record, batch)
