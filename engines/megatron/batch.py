"""From samples to packed micro-batches: who computes which tokens.

Every rank makes the same plan from the whole batch and keeps its part, so no rank has to tell
another what it holds. Rows are spread by cost over the data parallel ranks, then packed into
micro-batches within the token budget; every rank gets the same number of micro-batches.
"""

import itertools
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rollflow.engines.algorithms.config import AlgorithmConfig, PolicyConfig
from rollflow.engines.algorithms.inputs import AdvantageFn
from rollflow.engines.algorithms.policy import compute_outcomes, needs
from rollflow.engines.algorithms.reduction import sample_weights
from rollflow.storage.samples import TEACHER_LOGPROBS, Sample, Status

from .attention import Layout, PackedSequences, pack
from .router_replay import Experts, on_the_row, sample_experts


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
class MicroBatch:
    """Packed rows: ``T`` tokens go in, ``M`` of them have a next token that is trained on.

    Context parallel ranks hold parts of the ``T`` tokens and know of all ``M``.
    """

    tokens_T: Tensor
    packed: PackedSequences
    held_H: Tensor
    """Which of the ``M`` this rank predicts; all of them without context parallelism."""
    places_H: Tensor
    """Where among ``tokens_T`` it predicts them."""
    targets_M: Tensor
    weights_M: Tensor
    outcomes_M: Tensor
    rewards_M: Tensor
    segments_M: Tensor
    """Number of the row that each trained token belongs to."""
    rollout_logprobs_M: Tensor
    teacher_logprobs_M: Tensor | None

    def routed_freely(self) -> "MicroBatch":
        """The same, with experts that the model's own routers choose."""
        return replace(self, packed=replace(self.packed, experts_TLK=None))


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
            chosen = sample_experts(sample, experts) if experts else None
            rows.append(replace(row, experts_tLK=chosen))
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


def plan_micro_batches(
    lengths: Sequence[int], ranks: int, max_tokens: int, cost: Callable[[int], float] = float
) -> list[list[list[int]]]:
    """Which rows each rank takes in which micro-batch: ``[rank][micro-batch][row numbers]``.

    ``cost`` of a row's length is what the ranks' shares are balanced by. No micro-batch exceeds
    ``max_tokens`` unless by one long row alone. All ranks have equally many; one that a rank has no
    row for is empty.
    """
    longest_first = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    loads = [0.0] * ranks
    shares: list[list[int]] = [[] for _ in range(ranks)]
    for i in longest_first:
        rank = loads.index(min(loads))
        loads[rank] += cost(lengths[i])
        shares[rank].append(i)
    plan = [_fill(share, lengths, max_tokens) for share in shares]
    count = max(len(bins) for bins in plan)
    return [_spread(bins, count) for bins in plan]


def make_micro_batches(
    rows: Sequence[Row],
    config: AlgorithmConfig,
    *,
    rank: int,
    ranks: int,
    max_tokens: int,
    device: str,
    layout: Layout | None = None,
    cost: Callable[[int], float] = float,
) -> list[MicroBatch]:
    """This data parallel rank's micro-batches of one mini-batch of ``rows``.

    Each token's weight is its share of the loss of the whole mini-batch. ``layout`` says which part
    of a micro-batch's tokens this context parallel rank computes.
    """
    weights = sample_weights(
        [len(r.trained_m) for r in rows],
        config.reduction,
        [(r.group_id, r.episode_id) for r in rows],  # the same name elsewhere is another episode
        config.constant_tokens if isinstance(config, PolicyConfig) else 0,
    )
    plan = plan_micro_batches([len(r.tokens_t) for r in rows], ranks, max_tokens, cost)
    layout = layout or Layout()
    return [
        _pack_rows([rows[i] for i in bin_], [weights[i] for i in bin_], device, layout)
        if bin_
        else _pack_rows([rows[0]], [0.0], device, layout)
        for bin_ in plan[rank]
    ]


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


def _fill(share: Sequence[int], lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """First fit, longest first."""
    bins: list[list[int]] = []
    room: list[int] = []
    for i in share:
        fits = (b for b, left in enumerate(room) if lengths[i] <= left)
        b = next(fits, len(bins))
        if b == len(bins):
            bins.append([])
            room.append(max_tokens)
        bins[b].append(i)
        room[b] -= lengths[i]
    return bins


def _spread(bins: list[list[int]], count: int) -> list[list[int]]:
    """Split the fullest micro-batches until there are ``count``."""
    bins = [sorted(b) for b in bins]
    while len(bins) < count:
        fullest = max(range(len(bins)), key=lambda b: len(bins[b]), default=None)
        rows = [] if fullest is None else bins[fullest]
        bins.append(rows[1::2])
        if fullest is not None and len(rows) > 1:
            bins[fullest] = rows[::2]
    return bins


def _pack_rows(
    rows: Sequence[Row], weights: Sequence[float], device: str, layout: Layout
) -> MicroBatch:
    lengths = [len(row.tokens_t) for row in rows]
    starts = torch.tensor([0, *lengths[:-1]]).cumsum(0).tolist()
    trained_M = torch.cat([row.trained_m + start for row, start in zip(rows, starts, strict=True)])
    counts = torch.tensor([len(row.trained_m) for row in rows])
    packed = pack(lengths, device, layout)
    tokens_T, held_H, places_H = _own_part(rows, trained_M, packed.source_T.cpu())
    teacher = [row.teacher_logprobs_m for row in rows if row.teacher_logprobs_m is not None]
    experts = [row.experts_tLK for row in rows if row.experts_tLK is not None]
    if experts:
        chosen_TLK = on_the_row(torch.cat(experts), packed.source_T.cpu())
        packed = replace(packed, experts_TLK=chosen_TLK.to(device))

    def spread(values: Sequence[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float32).repeat_interleave(counts).to(device)

    return MicroBatch(
        tokens_T=tokens_T.to(device),
        packed=packed,
        held_H=held_H.to(device),
        places_H=places_H.to(device),
        targets_M=torch.cat([row.targets_m for row in rows]).to(device),
        weights_M=spread(weights),
        outcomes_M=spread([row.outcome for row in rows]),
        rewards_M=spread([row.reward for row in rows]),
        segments_M=torch.arange(len(rows)).repeat_interleave(counts).to(device),
        rollout_logprobs_M=torch.cat([row.rollout_logprobs_m for row in rows]).to(device),
        teacher_logprobs_M=torch.cat(teacher).to(device) if teacher else None,
    )


def _own_part(
    rows: Sequence[Row], trained_M: Tensor, source_T: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """This rank's tokens (padding is token 0), which of the trained it predicts, and where."""
    whole = torch.cat([row.tokens_t for row in rows])
    if torch.equal(source_T, torch.arange(len(whole))):  # the whole row, as it is
        return whole, torch.arange(len(trained_M)), trained_M
    real_T = source_T >= 0
    tokens_T = torch.where(real_T, whole[source_T.clamp(min=0)], 0)
    place = torch.full((len(whole),), -1, dtype=torch.long)
    place[source_T[real_T]] = real_T.nonzero().flatten()
    held_H = (place[trained_M] >= 0).nonzero().flatten()
    return tokens_T, held_H, place[trained_M[held_H]]
