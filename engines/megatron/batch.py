"""From rows to packed micro-batches: who computes which tokens.

Every rank makes the same plan from the whole batch and keeps its part, so no rank has to tell
another what it holds. Rows are spread by cost over the data parallel ranks, then packed into
micro-batches within the token budget; every rank gets the same number of micro-batches.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rollflow.engines.algorithms.config import AlgorithmConfig, PolicyConfig
from rollflow.engines.algorithms.reduction import sample_weights

from .attention import Layout, PackedSequences, pack
from .router_replay import on_the_row
from .rows import Row


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
