"""A token drawn from softmax(logits / temperature), and its log-probability, in one pass. Needs Triton."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 4096
"""Columns of a part: what one program adds up."""
UNITS = tl.constexpr(float(1 << 40))
"""Weights are drawn among as whole numbers of 2^-40, whose sums are exact: of any order, never falling."""


def draw(logits_RV: Tensor, temperatures_R: Tensor) -> tuple[Tensor, Tensor]:
    """(tokens, int32 [R]; their log-probabilities in nats, float32 [R]).

    A part of the columns is drawn by its weight, then a column of that part by its own. A token that is
    less likely than its part's likeliest by 2^-40 is not drawn. The random numbers come from PyTorch's
    generator of this GPU.
    """
    rows, columns = logits_RV.shape
    logits_RV = logits_RV.contiguous()
    parts = triton.cdiv(columns, BLOCK)
    found = logits_RV.new_empty((2, rows, parts), dtype=torch.float32)
    tokens_R = logits_RV.new_empty(rows, dtype=torch.int32)
    logprobs_R = logits_RV.new_empty(rows, dtype=torch.float32)
    if not rows:
        return tokens_R, logprobs_R
    random_R2 = torch.rand((rows, 2), dtype=torch.float64, device=logits_RV.device)
    scales_R = temperatures_R.reshape(-1)
    weigh: Any = _weigh
    weigh[(rows, parts)](logits_RV, scales_R, found[0], found[1], columns, BLOCK=BLOCK, num_warps=4)
    choose: Any = _choose
    choose[(rows,)](
        logits_RV,
        scales_R,
        found[0],
        found[1],
        random_R2,
        tokens_R,
        logprobs_R,
        columns,
        parts,
        PARTS=triton.next_power_of_2(parts),
        BLOCK=BLOCK,
        num_warps=8,
    )
    return tokens_R, logprobs_R


@triton.jit
def _weigh(
    logits,  # noqa: ANN001 - Triton reads annotations
    temperatures,  # noqa: ANN001
    tops,  # noqa: ANN001
    totals,  # noqa: ANN001
    columns,  # noqa: ANN001
    BLOCK: tl.constexpr,
):
    """Of each part: its largest z, and the sum of exp(z - that)."""
    row, part = tl.program_id(0), tl.program_id(1)
    z = _part(logits, temperatures, row, part, columns, BLOCK)
    top = tl.maximum(tl.max(z, 0), -1e30)
    at = row * tl.num_programs(1) + part
    tl.store(tops + at, top)
    tl.store(totals + at, tl.sum(tl.exp(z - top), 0))


@triton.jit
def _choose(
    logits,  # noqa: ANN001
    temperatures,  # noqa: ANN001
    tops,  # noqa: ANN001
    totals,  # noqa: ANN001
    random,  # noqa: ANN001
    tokens,  # noqa: ANN001
    logprobs,  # noqa: ANN001
    columns,  # noqa: ANN001
    parts,  # noqa: ANN001
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0)
    i = tl.arange(0, PARTS)
    top = tl.load(tops + row * parts + i, mask=i < parts, other=-1e30)
    total = tl.load(totals + row * parts + i, mask=i < parts, other=0)
    highest = tl.max(top, 0)
    weight = total * tl.exp(top - highest)
    part = tl.minimum(_drawn(weight, tl.load(random + 2 * row)), parts - 1)
    z = _part(logits, temperatures, row, part, columns, BLOCK)
    weight_B = tl.exp(z - tl.maximum(tl.max(z, 0), -1e30))
    place = tl.minimum(_drawn(weight_B, tl.load(random + 2 * row + 1)), BLOCK - 1)
    chosen = tl.max(tl.where(tl.arange(0, BLOCK) == place, z, float("-inf")), 0)
    tl.store(tokens + row, tl.minimum(part * BLOCK + place, columns - 1))
    tl.store(logprobs + row, chosen - highest - tl.log(tl.sum(weight, 0)))


@triton.jit
def _part(logits, temperatures, row, part, columns, BLOCK: tl.constexpr):  # noqa: ANN001
    """The part's logits by the row's temperature; -inf where it has no column."""
    column = part * BLOCK + tl.arange(0, BLOCK)
    here = logits + row.to(tl.int64) * columns + column
    z = tl.load(here, mask=column < columns, other=float("-inf")).to(tl.float32)
    return z * (1 / tl.load(temperatures + row))


@triton.jit
def _drawn(weights, random):  # noqa: ANN001
    """Where the running sum of the weights first exceeds that share, below 1, of their whole."""
    sums = tl.cumsum((weights * UNITS).to(tl.int64), 0)
    share = (random * tl.max(sums, 0).to(tl.float64)).to(tl.int64)
    return tl.sum((sums <= share).to(tl.int32), 0)
