"""What a sample did to the weights, by the trainer's own functions on the stored batch."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import TypeAdapter

from rollflow.engines.algorithms.config import AlgorithmConfig, own_function
from rollflow.engines.hooks import load_hook
from rollflow.storage.lineage import TrainedStep, samples_of
from rollflow.storage.objects import Store
from rollflow.storage.samples import Sample

CLIP_GRAD = 1.0
"""The trainer's default of ``megatron.clip_grad``."""


@dataclass(frozen=True, slots=True)
class Influence:
    """How a sample counted in the step that trained on it."""

    advantage: float | None
    """Over its group, or its reward where the algorithm works token by token; None where the sample
    was not trained on."""
    update: int | None
    """Which of the step's updates it was part of."""
    share: float
    """Its part of |advantage| x weight over the tokens of that update, 0 to 1."""
    grad_norm: float
    """Of the step before clipping, the largest of its updates where the record has it."""
    clip_grad: float
    """Limit of the gradient's norm; 0: none."""

    @property
    def clipped(self) -> bool:
        """Whether a gradient of the step was clipped."""
        return 0 < self.clip_grad < self.grad_norm


def influence(
    store: Store, settings: Mapping[str, Any], step: TrainedStep, sample: Sample
) -> Influence:
    """Compute from the stored batch what the trainer computed of this sample.

    ``settings`` are those of the run whose step it is.
    """
    from rollflow.engines.megatron.rows import Row, cut_mini_batches

    rows = _rows(settings, step, list(samples_of(store, step)))
    metrics = step.record.ref.metrics
    norm = metrics.get("train/grad_norm_max", metrics.get("train/grad_norm", 0.0))
    clip = float(settings["megatron"].get("clip_grad", CLIP_GRAD))
    if (mine := rows.get(sample.sample_id)) is None:
        return Influence(None, None, 0.0, norm, clip)
    updates = cut_mini_batches(list(rows.values()), settings["trainer"]["updates_per_batch"])
    number, members = next((n, m) for n, m in enumerate(updates) if any(r is mine for r in m))

    def pull(row: Row, weight: float) -> float:
        return abs(row.outcome) * weight * len(row.trained_m)

    pulls = [pull(row, w) for row, w in zip(members, _weights(settings, members), strict=True)]
    own = next(p for row, p in zip(members, pulls, strict=True) if row is mine)
    return Influence(mine.outcome, number, own / sum(pulls) if own else 0.0, norm, clip)


def trained_ids(settings: Mapping[str, Any], step: TrainedStep, store: Store) -> list[str]:
    """Ids of the samples of a step that were trained on, in order."""
    return list(_rows(settings, step, list(samples_of(store, step))))


def _rows(
    settings: Mapping[str, Any], step: TrainedStep, samples: Sequence[Sample]
) -> dict[str, Any]:
    """The trainer's rows by sample id; a sample that was not trained on has none."""
    from rollflow.engines.megatron.rows import make_rows

    config = _algorithm(settings)
    rows = iter(make_rows(samples, config, step.record.ref.step, _own_advantage(config)))
    found: dict[str, Any] = {}
    row = next(rows, None)
    for sample in samples:  # rows keep the order, and leave out
        tokens = sample.prompt_ids + sample.response_ids
        if row is not None and row.group_id == sample.group_id and _is_of(row, sample, tokens):
            found[sample.sample_id] = row
            row = next(rows, None)
    if row is not None:
        raise ValueError(f"step {step.record.ref.step}: a trained row belongs to no stored sample")
    return found


def _is_of(row: Any, sample: Sample, tokens: list[int]) -> bool:
    """Whether the trainer made ``row`` of ``sample``: one that it left out can look alike."""
    is_trained = any(sample.loss_mask) and sample.status.value != "failed"
    return (
        is_trained and row.episode_id == sample.episode_id and row.tokens_t.tolist() == tokens[:-1]
    )


def _weights(settings: Mapping[str, Any], rows: Sequence[Any]) -> list[float]:
    from rollflow.engines.algorithms.config import PolicyConfig
    from rollflow.engines.algorithms.reduction import sample_weights

    config = _algorithm(settings)
    return sample_weights(
        [len(row.trained_m) for row in rows],
        config.reduction,
        [row.episode_id for row in rows],
        config.constant_tokens if isinstance(config, PolicyConfig) else 0,
    )


def _algorithm(settings: Mapping[str, Any]) -> AlgorithmConfig:
    return TypeAdapter(AlgorithmConfig).validate_python(settings["algorithm"])


def _own_advantage(config: AlgorithmConfig) -> Any:
    path = own_function(config, "advantage")
    return load_hook(path, "advantage") if path else None
