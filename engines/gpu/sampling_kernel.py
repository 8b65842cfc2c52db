"""A token drawn from softmax(logits / temperature), and its log-probability, in one pass. Needs Triton."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 4096
PARTS = 8
"""Programs that share a row, so that few rows keep a GPU busy too."""


def draw(logits_RV: Tensor, temperatures_R: Tensor) -> tuple[Tensor, Tensor]:
    """(tokens, int32 [R]; their log-probabilities in nats, float32 [R]).

    The largest of z - log(E) has softmax's distribution where each E is drawn from the exponential one
    (the Gumbel-max trick). The random numbers follow from PyTorch's generator of this GPU.
    """
    rows, columns = logits_RV.shape
    logits_RV = logits_RV.contiguous()
    numbers = logits_RV.new_empty((4, rows, PARTS), dtype=torch.float32)
    places = logits_RV.new_empty((rows, PARTS), dtype=torch.int32)
    tokens_R = logits_RV.new_empty(rows, dtype=torch.int32)
    logprobs_R = logits_RV.new_empty(rows, dtype=torch.float32)
    if not rows:
        return tokens_R, logprobs_R
    seed = torch.randint(1 << 62, (1,), device=logits_RV.device)
    parts: Any = _parts
    parts[(rows, PARTS)](
        logits_RV,
        temperatures_R.reshape(-1),
        seed,
        numbers,
        places,
        rows,
        columns,
        PARTS=PARTS,
        BLOCK=BLOCK,
        num_warps=8,
    )
    join: Any = _join
    join[(rows,)](numbers, places, tokens_R, logprobs_R, rows, PARTS=PARTS, num_warps=1)
    return tokens_R, logprobs_R


@triton.jit
def _parts(
    logits,  # noqa: ANN001 - Triton reads annotations
    temperatures,  # noqa: ANN001
    seed,  # noqa: ANN001
    numbers,  # noqa: ANN001
    places,  # noqa: ANN001
    rows,  # noqa: ANN001
    columns,  # noqa: ANN001
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row, part = tl.program_id(0), tl.program_id(1)
    scale = 1 / tl.load(temperatures + row)
    key = tl.load(seed)
    width = tl.cdiv(columns, PARTS)
    first = part * width
    last = tl.minimum(first + width, columns)
    here = logits + row.to(tl.int64) * columns
    QUARTER: tl.constexpr = BLOCK // 4
    lane = tl.arange(0, QUARTER)
    best = tl.full([QUARTER], float("-inf"), tl.float32)
    value = tl.full([QUARTER], float("-inf"), tl.float32)
    place = tl.zeros([QUARTER], tl.int32)
    highest = tl.full([QUARTER], -1e30, tl.float32)
    total = tl.zeros([QUARTER], tl.float32)
    for start in range(first, last, BLOCK):
        r0, r1, r2, r3 = tl.randint4x(key, row * columns + start + lane)
        c0 = start + lane
        c1, c2, c3 = c0 + QUARTER, c0 + 2 * QUARTER, c0 + 3 * QUARTER
        z0 = tl.load(here + c0, mask=c0 < last, other=float("-inf")).to(tl.float32) * scale
        z1 = tl.load(here + c1, mask=c1 < last, other=float("-inf")).to(tl.float32) * scale
        z2 = tl.load(here + c2, mask=c2 < last, other=float("-inf")).to(tl.float32) * scale
        z3 = tl.load(here + c3, mask=c3 < last, other=float("-inf")).to(tl.float32) * scale
        higher = tl.maximum(highest, tl.maximum(tl.maximum(z0, z1), tl.maximum(z2, z3)))
        total = total * tl.exp(highest - higher) + (
            tl.exp(z0 - higher) + tl.exp(z1 - higher) + tl.exp(z2 - higher) + tl.exp(z3 - higher)
        )
        highest = higher
        best, value, place = _better(best, value, place, z0, c0, r0)
        best, value, place = _better(best, value, place, z1, c1, r1)
        best, value, place = _better(best, value, place, z2, c2, r2)
        best, value, place = _better(best, value, place, z3, c3, r3)
    top = tl.max(highest, 0)
    winner = tl.max(best, 0)
    chosen = tl.min(tl.where(best == winner, place, 2147483647), 0)
    at = row * PARTS + part
    tl.store(numbers + at, winner)
    tl.store(
        numbers + rows * PARTS + at, tl.max(tl.where(place == chosen, value, float("-inf")), 0)
    )
    tl.store(numbers + 2 * rows * PARTS + at, top)
    tl.store(numbers + 3 * rows * PARTS + at, tl.sum(total * tl.exp(highest - top), 0))
    tl.store(places + at, chosen)


@triton.jit
def _better(best, value, place, z, column, random):  # noqa: ANN001
    """Of each lane: what has won so far, or the column with its random number."""
    u = (random.to(tl.uint32, bitcast=True).to(tl.float32) + 0.5) * 2.3283064365386963e-10
    # -log(1 - u); near 0, which wins, 1 - u would round the small u away.
    e = tl.where(u < 0.01, u * (1 + u * (0.5 + u * 0.33333333)), -tl.log(1 - u))
    score = z - tl.log(e)
    wins = score > best
    return (
        tl.where(wins, score, best),
        tl.where(wins, z, value),
        tl.where(wins, column, place),
    )


@triton.jit
def _join(
    numbers,  # noqa: ANN001
    places,  # noqa: ANN001
    tokens,  # noqa: ANN001
    logprobs,  # noqa: ANN001
    rows,  # noqa: ANN001
    PARTS: tl.constexpr,
):
    row = tl.program_id(0)
    at = row * PARTS + tl.arange(0, PARTS)
    best = tl.load(numbers + at)
    value = tl.load(numbers + rows * PARTS + at)
    highest = tl.load(numbers + 2 * rows * PARTS + at)
    total = tl.load(numbers + 3 * rows * PARTS + at)
    place = tl.load(places + at)
    winner = tl.max(best, 0)
    chosen = tl.min(tl.where(best == winner, place, 2147483647), 0)
    z = tl.max(tl.where(place == chosen, value, float("-inf")), 0)
    top = tl.max(highest, 0)
    tl.store(tokens + row, chosen)
    tl.store(logprobs + row, z - top - tl.log(tl.sum(total * tl.exp(highest - top), 0)))
