"""Log-probability and entropy of targets in one pass over the logits each way. Importing it needs Triton.

The same numbers as :mod:`~rollflow.engines.algorithms.logprobs` computes chunk by chunk, where no
ranks share the vocabulary. Each token is one program that adds up in a fixed order.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 4096


def forward(
    logits_TV: Tensor, targets_T: Tensor, columns: int, temperature: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(log-probability, entropy, highest logit, log-normaliser less it), each float32 [T]."""
    logits_TV = logits_TV.contiguous()
    results_4T = logits_TV.new_empty((4, len(logits_TV)), dtype=torch.float32)
    if len(logits_TV):
        kernel: Any = _forward
        kernel[(len(logits_TV),)](
            logits_TV,
            targets_T,
            results_4T,
            len(logits_TV),
            logits_TV.shape[1],
            columns,
            1 / temperature,
            BLOCK=BLOCK,
            num_warps=8,
        )
    logprobs_T, entropy_T, highest_T, log_total_T = results_4T
    return logprobs_T, entropy_T, highest_T, log_total_T


def backward(
    logits_TV: Tensor,
    targets_T: Tensor,
    stats: tuple[Tensor, Tensor, Tensor],
    on_logprobs_T: Tensor,
    on_entropy_T: Tensor | None,
    columns: int,
    temperature: float,
) -> Tensor:
    """Gradient of the logits, in their type. ``stats``: highest logit, log-normaliser, entropy."""
    logits_TV = logits_TV.contiguous()
    gradient_TV = torch.empty_like(logits_TV)
    if len(logits_TV):
        highest_T, log_total_T, entropy_T = stats
        kernel: Any = _backward
        kernel[(len(logits_TV),)](
            logits_TV,
            gradient_TV,
            targets_T,
            highest_T,
            log_total_T,
            entropy_T,
            on_logprobs_T.contiguous(),
            entropy_T if on_entropy_T is None else on_entropy_T.contiguous(),
            logits_TV.shape[1],
            columns,
            1 / temperature,
            HAS_ENTROPY=on_entropy_T is not None,
            BLOCK=BLOCK,
            num_warps=8,
        )
    return gradient_TV


@triton.jit
def _forward(
    logits,  # noqa: ANN001 - Triton reads annotations
    targets,  # noqa: ANN001
    results,  # noqa: ANN001
    tokens,  # noqa: ANN001
    width,  # noqa: ANN001
    columns,  # noqa: ANN001
    scale,  # noqa: ANN001
    BLOCK: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    row = logits + token * width
    # Per lane: the highest so far, and sums of e^(z - highest) and of it times (z - highest).
    highest = tl.full([BLOCK], -1e30, tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    weighted = tl.zeros([BLOCK], tl.float32)
    for start in range(0, columns, BLOCK):
        column = start + lane
        z = tl.load(row + column, mask=column < columns, other=float("-inf")).to(tl.float32) * scale
        higher = tl.maximum(highest, z)
        fall = highest - higher
        shrink = tl.exp(fall)
        power = tl.exp(z - higher)
        weighted = shrink * (weighted + fall * total) + tl.where(
            power == 0, 0.0, power * (z - higher)
        )
        total = shrink * total + power
        highest = higher
    top = tl.max(highest, 0)
    fall = highest - top
    shrink = tl.exp(fall)
    weighted_sum = tl.sum(tl.where(shrink == 0, 0.0, shrink * (weighted + fall * total)), 0)
    sum_ = tl.sum(shrink * total, 0)
    log_total = tl.log(sum_)
    target = tl.load(targets + token)
    owned = (target >= 0) & (target < columns)
    z_target = tl.load(row + tl.where(owned, target, 0)).to(tl.float32) * scale
    logprob = tl.where(owned, z_target - top - log_total, float("nan"))
    tl.store(results + token, logprob)
    tl.store(results + tokens + token, log_total - weighted_sum / sum_)
    tl.store(results + 2 * tokens + token, top)
    tl.store(results + 3 * tokens + token, log_total)


@triton.jit
def _backward(
    logits,  # noqa: ANN001
    gradient,  # noqa: ANN001
    targets,  # noqa: ANN001
    highest,  # noqa: ANN001
    log_total,  # noqa: ANN001
    entropy,  # noqa: ANN001
    on_logprobs,  # noqa: ANN001
    on_entropy,  # noqa: ANN001
    width,  # noqa: ANN001
    columns,  # noqa: ANN001
    scale,  # noqa: ANN001
    HAS_ENTROPY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    row = logits + token * width
    target = tl.load(targets + token)
    top = tl.load(highest + token)
    rest = tl.load(log_total + token)
    amount = tl.load(on_logprobs + token)
    for start in range(0, width, BLOCK):
        column = start + lane
        z = tl.load(row + column, mask=column < columns, other=float("-inf")).to(tl.float32) * scale
        log_p = z - top - rest
        p = tl.exp(log_p)
        if HAS_ENTROPY:
            log_p = tl.where(p == 0, 0.0, log_p) + tl.load(entropy + token)
            g = -p * (amount + tl.load(on_entropy + token) * log_p)
        else:
            g = -p * amount
        g = tl.where((column == target) & (column < columns), g + amount, g) * scale
        tl.store(
            gradient + token * width + column, g.to(gradient.dtype.element_ty), mask=column < width
        )
