"""SwiGLU of products that still lack the norm of what was multiplied, in one pass. Needs Triton."""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from .heads_kernel import inverse_root_mean_square

BLOCK = 1024
"""Columns that one program takes."""


def swiglu_of(gate_up_TC: Tensor, stream_TH: Tensor, epsilon: float) -> Tensor:
    """silu(gate) * up [T, I], where both halves of ``gate_up_TC`` [T, 2 * I] are first divided by the root
    mean square of their token's row of ``stream_TH``."""
    tokens, both = gate_up_TC.shape
    product_TI = gate_up_TC.new_empty((tokens, both // 2))
    if tokens:
        kernel: Any = _swiglu
        kernel[(tokens, triton.cdiv(both // 2, BLOCK))](
            gate_up_TC,
            stream_TH,
            product_TI,
            epsilon,
            COLUMNS=both // 2,
            BLOCK=BLOCK,
            WIDTH=stream_TH.shape[1],
            SPAN=triton.next_power_of_2(stream_TH.shape[1]),
            num_warps=4,
        )
    return product_TI


@triton.jit
def _swiglu(
    gate_up,  # noqa: ANN001 - Triton reads annotations
    residual,  # noqa: ANN001
    product,  # noqa: ANN001
    epsilon,  # noqa: ANN001
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
    SPAN: tl.constexpr,
):
    token = tl.cast(tl.program_id(0), tl.int64)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    there = i < COLUMNS
    source = gate_up + token * 2 * COLUMNS + i
    gate = tl.load(source, mask=there, other=0).to(tl.float32)
    up = tl.load(source + COLUMNS, mask=there, other=0).to(tl.float32)
    inverse = inverse_root_mean_square(residual, token, epsilon, WIDTH, SPAN)
    gate *= inverse
    result = gate * tl.sigmoid(gate) * (up * inverse)
    tl.store(product + token * COLUMNS + i, result.to(product.dtype.element_ty), mask=there)
