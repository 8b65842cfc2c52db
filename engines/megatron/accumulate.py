"""Gradients of bfloat16 weights, added to megatron-core's float32 ones as backward makes them, on a GPU.

megatron-core's data parallel wrapper adds each by an operation that reaches half of the memory's rate,
once for each weight and micro-batch: 4 % of a step.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

Add = Callable[[Tensor, Tensor], None]
SMALL = 1 << 16
"""Below so many numbers PyTorch's addition is done before another kernel would have been launched."""


def add_gradients(chunks: list[Any], add: Add | None = None) -> int:
    """Let ``add`` (by default the kernel of ours) add up gradients of the chunks' weights; of how many.

    Left to megatron-core are small ones, other types, and all where it sends gradients to other ranks
    while backward runs, or where its own products add them up.
    """
    weights = [
        weight
        for chunk in chunks
        if not (
            chunk.ddp_config.overlap_grad_reduce
            or getattr(chunk.config, "gradient_accumulation_fusion", False)
        )
        for weight in chunk.parameters()
        if _fits(weight)
    ]
    for weight in weights:
        weight.register_post_accumulate_grad_hook(partial(_added, add or _kernel()))
    return len(weights)


def _fits(weight: Any) -> bool:
    total = getattr(weight, "main_grad", None)
    return (
        weight.requires_grad
        and weight.dtype is torch.bfloat16
        and weight.numel() >= SMALL
        and total is not None
        and total.dtype is torch.float32
        and total.is_contiguous()
    )


def _added(add: Add, weight: Any) -> None:
    """megatron-core's hook comes next, and finds nothing to add."""
    add(weight.main_grad, weight.grad.contiguous())
    weight.grad = None


def _kernel() -> Add:
    from rollflow.engines.gpu.add_kernel import add_to

    return add_to
