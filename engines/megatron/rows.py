"""Samples as the trainer sees them: which can be trained on, and what of them. No Megatron is needed here."""

import itertools
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from rollflow.engines.algorithms.config import AlgorithmConfig
from rollflow.engines.algorithms.inputs import AdvantageFn
from rollflow.engines.algorithms.policy import compute_outcomes, needs
from rollflow.storage.samples import EXPERTS_DTYPE, TEACHER_LOGPROBS, Sample, Status


@dataclass(frozen=True, slots=True)
class Row:
    """A sample as the trainer sees it. ``t`` = tokens - 1: the last token predicts nothing."""

    group_id: str
    episode_id: str
    tokens_t: Tensor
    """What goes in, long."""
    trained_m: Tensor
    """Places in ``tokens_t`` whose next token is trained on, long."""
    targets_m: Tensor
    """Those next tokens."""
    rollout_logprobs_m: Tensor
    teacher_logprobs_m: Tensor | None
    reward: float
    """0 where the algorithm asks for none and there is none."""
    outcome: float
    """Its advantage over its group, or its reward; see ``policy.compute_outcomes``."""
    stale: bool
    """Some token was sampled by other weights than the batch's step names."""
    experts_tLK: Tensor | None = None
    """Where the servers' routers sent each token; only under router replay."""


@dataclass(frozen=True, slots=True)
class Experts:
    """What a model's routers choose from."""

    layers: int
    """All layers of the model, those without experts too."""
    per_token: int
    count: int


def make_rows(
    samples: Sequence[Sample],
    config: AlgorithmConfig,
    version: int,
    own_advantage: AdvantageFn | None = None,
    experts: Experts | None = None,
) -> list[Row]:
    """The samples that can be trained on, in their order; the others had nothing to give.

    Left out are samples that failed, that miss a reward which the algorithm needs, or that have no
    trained token; none of them counts in a group's statistics unless it has a reward. With
    ``experts`` the rows have the servers' choice of them.

    Raises:
        ValueError: a sample lacks the teacher's log-probabilities that the algorithm needs, or the
            experts that are to be replayed.
    """
    outcomes = compute_outcomes(
        config,
        scored_rewards(samples),
        [s.group_id for s in samples],
        [s.episode_id for s in samples],
        own_advantage,
    ).tolist()
    need = needs(config)
    rows: list[Row] = []
    for sample, outcome in zip(samples, outcomes, strict=True):
        if sample.status is Status.FAILED or (sample.reward is None and need.rewards):
            continue
        row = _row(sample, outcome, version, need.teacher_logprobs)
        if len(row.trained_m):
            rows.append(
                replace(row, experts_tLK=sample_experts(sample, experts)) if experts else row
            )
    return rows


def scored_rewards(samples: Sequence[Sample]) -> list[float | None]:
    """The rewards; None for a sample that failed or has none."""
    return [None if s.status is Status.FAILED else s.reward for s in samples]


def cut_mini_batches(rows: Sequence[Row], updates: int) -> list[list[Row]]:
    """Cut the rows into ``updates`` mini-batches of whole groups, in order of the group ids.

    Raises:
        ValueError: there are fewer groups than updates.
    """
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row.group_id, []).append(row)
    names = sorted(groups)
    if len(names) < updates:
        raise ValueError(
            f"trainer.updates_per_batch is {updates} but the batch has {len(names)} groups to "
            "train on; lower it or generate more prompts per step"
        )
    borders = [round(i * len(names) / updates) for i in range(updates + 1)]
    return [
        [row for name in names[a:b] for row in groups[name]] for a, b in itertools.pairwise(borders)
    ]


def sample_experts(sample: Sample, experts: Experts) -> Tensor:
    """The choice that is stored with a sample, int16 [tokens - 1, layers, experts per token].

    Raises:
        ValueError: the sample has none, or none that this model can have made; names the sample.
    """
    tokens = len(sample.prompt_ids) + len(sample.response_ids) - 1
    if sample.routed_experts is None:
        raise ValueError(
            f"sample {sample.sample_id} has no routed_experts, which trainer.router_replay needs; was it "
            "set when the sample was made, and does the generate function hand on what "
            "engine.generate gave?"
        )
    found = np.frombuffer(sample.routed_experts, EXPERTS_DTYPE)
    if found.size != (wanted := tokens * experts.layers * experts.per_token):
        raise ValueError(
            f"sample {sample.sample_id}: routed_experts has {found.size} numbers where {tokens} tokens, "
            f"{experts.layers} layers and {experts.per_token} experts a token make {wanted}; "
            "they are of another model, or of another text than the sample's"
        )
    if found.size and (largest := int(found.max())) >= experts.count:
        raise ValueError(
            f"sample {sample.sample_id}: routed_experts names expert {largest} of {experts.count}"
        )
    return torch.from_numpy(found.astype(np.int16)).view(tokens, experts.layers, experts.per_token)


def _row(sample: Sample, outcome: float, version: int, teacher: bool) -> Row:
    tokens = _tensor("q", sample.prompt_ids + sample.response_ids)
    first = len(sample.prompt_ids)
    if first and all(sample.loss_mask):  # most samples: slices take a fourth of the time
        place_m, response_m = slice(first, None), slice(None)
        trained_m = torch.arange(first - 1, len(tokens) - 1)
    else:
        response_m = _tensor("b", sample.loss_mask).nonzero().flatten()
        if first == 0:
            response_m = response_m[response_m > 0]
        place_m = response_m + first
        trained_m = place_m - 1
    return Row(
        group_id=sample.group_id,
        episode_id=sample.episode_id,
        tokens_t=tokens[:-1],
        trained_m=trained_m,
        targets_m=tokens[place_m],
        rollout_logprobs_m=_tensor("f", sample.rollout_logprobs)[response_m],
        teacher_logprobs_m=_teacher_logprobs(sample)[response_m] if teacher else None,
        reward=sample.reward or 0.0,
        outcome=outcome,
        stale=sample.policy_versions.count(version) < len(sample.policy_versions),
    )


def _tensor(code: str, numbers: Sequence[float]) -> Tensor:
    """A list as a tensor of the type that ``array`` calls ``code``; torch.tensor takes four times as long."""
    if not numbers:
        return torch.empty(0, dtype=_TYPES[code])
    return torch.frombuffer(array(code, numbers), dtype=_TYPES[code])


_TYPES = {"q": torch.int64, "f": torch.float32, "b": torch.int8}


def _teacher_logprobs(sample: Sample) -> Tensor:
    """As the rollout side stored them, one for each response token."""
    found = sample.metadata.get(TEACHER_LOGPROBS)
    if found is None or len(found) != len(sample.response_ids):
        has = "none" if found is None else str(len(found))
        raise ValueError(
            f"sample {sample.sample_id} has {has} of the teacher's log-probabilities for its "
            f"{len(sample.response_ids)} response tokens; was rollout.teacher set when it was made?"
        )
    return torch.tensor(found, dtype=torch.float32)
