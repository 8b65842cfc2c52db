"""Names of stored things, small enough to pass through any scheduler. Pass refs, not data."""

import secrets
from dataclasses import dataclass, field, replace


@dataclass(frozen=True, slots=True)
class RunRef:
    """A run in a store, e.g. ``RunRef("arithmetic", "/data/store/runs/arithmetic")``."""

    name: str
    url: str
    """fsspec URL of the run's prefix, no slash at the end."""
    epoch: int = field(default=0, compare=False)
    """Fencing epoch of the writer, from ``Lease.run``; 0: no lease was ever taken."""
    writer: str = field(default="", compare=False)
    """Name of a writer that holds no lease, from ``evaluator``; it may commit evaluations, no more."""


def evaluator(run: RunRef) -> RunRef:
    """The run, for a writer of evaluations alone: it needs no lease, so training may go on.

    What it writes has a name of its own, and of two evaluations of the same weights on the same
    dataset the first that is committed stands.
    """
    return replace(run, epoch=0, writer=secrets.token_hex(4))


@dataclass(frozen=True, slots=True)
class GroupsRef:
    """Groups that were generated for a step but are not committed yet."""

    run: RunRef
    step: int
    groups: int
    samples: int
    policy_version: int
    timings: dict[str, float] = field(default_factory=dict[str, float])
    """Seconds by phase so far: ``generate_s``, ``score_s``, ``write_s``."""
    metrics: dict[str, float] = field(default_factory=dict[str, float])
    """Scalars by slash name, e.g. ``rollout/reward``."""


@dataclass(frozen=True, slots=True)
class BatchRef:
    """A committed batch: what one step trains on, or what one evaluation produced."""

    run: RunRef
    step: int
    url: str
    """URL of the folder that holds ``manifest.json`` and its parts."""
    rows: int
    groups: int
    digest: str
    """sha256 over the parts' checksums: the batch's name everywhere."""
    metrics: dict[str, float] = field(default_factory=dict[str, float])
    """Scalars by slash name, e.g. ``rollout/reward``, ``perf/generate_s``; kept in the manifest."""


@dataclass(frozen=True, slots=True)
class CheckpointRef:
    """A committed checkpoint of a run: the weights and optimizer after ``step`` was trained."""

    run: RunRef
    step: int
    url: str
    weights_digest: str


@dataclass(frozen=True, slots=True)
class StepRef:
    """A committed step record (commit point B)."""

    run: RunRef
    step: int
    url: str
    batch_digest: str
    weights_digest: str
    metrics: dict[str, float] = field(default_factory=dict[str, float])
