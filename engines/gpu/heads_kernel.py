"""Queries and keys normalised and rotated, keys and values put into their cache, in one pass. Needs Triton."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

HEADS = 32
"""That one program takes."""


def queries_of(
    qkv_TC: Tensor,
    weights: tuple[Tensor, Tensor, float],
    cos_sin_PD: Tensor,
    positions_T: Tensor,
    slots_T: Tensor,
    keys_SHD: Tensor,
    values_SHD: Tensor,
    stream_TH: Tensor | None = None,
) -> Tensor:
    """Rotated queries [T, H * D] of tokens' projections; keys and values go to ``slots_T`` of the cache.

    ``qkv_TC`` has each token's queries, keys and values, head by head; ``weights`` are those of the RMS
    norms of queries and keys, and its epsilon; ``cos_sin_PD`` has by position the cosines of half a head,
    then the sines, float32. What is between norm and rotation is rounded, as by kernels of their own.
    ``stream_TH``: what was projected without having been divided by its root mean square; that of the
    projections is done here, with the same epsilon. From Hopper on it begins while the kernel before it ends, and lets
    the one after it begin: that must be launched as usual, or wait for this one (griddepcontrol.wait, as
    flashinfer's attention does) before it reads anything of it.
    """
    tokens, (_, groups, size) = len(qkv_TC), keys_SHD.shape
    heads = qkv_TC.shape[1] // size - 2 * groups
    queries_TC = qkv_TC.new_empty((tokens, heads * size))
    if tokens:
        kernel: Any = _prepare
        early = qkv_TC.is_cuda and torch.cuda.get_device_capability(qkv_TC.device)[0] >= 9
        kernel[(tokens, triton.cdiv(heads + 2 * groups, HEADS))](
            qkv_TC,
            queries_TC,
            *weights[:2],
            weights[2],
            cos_sin_PD,
            positions_T,
            slots_T,
            keys_SHD,
            values_SHD,
            qkv_TC.stride(0),
            keys_SHD.stride(0),
            values_SHD.stride(0),
            QUERIES=heads,
            GROUPS=groups,
            HALF=size // 2,
            HEADS=HEADS,
            residual=queries_TC if stream_TH is None else stream_TH,
            WIDTH=0 if stream_TH is None else stream_TH.shape[1],
            SPAN=1 if stream_TH is None else triton.next_power_of_2(stream_TH.shape[1]),
            EARLY=early,
            num_warps=4,
            launch_pdl=early,
        )
    return queries_TC


@triton.jit
def inverse_root_mean_square(  # noqa: ANN201 - Triton reads annotations
    residual,  # noqa: ANN001
    row,  # noqa: ANN001
    epsilon,  # noqa: ANN001
    WIDTH: tl.constexpr,
    SPAN: tl.constexpr,
):
    """Of one row of ``residual`` [T, WIDTH]; ``SPAN``: the next power of two."""
    i = tl.arange(0, SPAN)
    x = tl.load(residual + row * WIDTH + i, mask=i < WIDTH, other=0).to(tl.float32)
    return tl.rsqrt(tl.sum(x * x) / WIDTH + epsilon)


@triton.jit
def _prepare(
    qkv,  # noqa: ANN001 - Triton reads annotations
    queries,  # noqa: ANN001
    query_weight,  # noqa: ANN001
    key_weight,  # noqa: ANN001
    epsilon,  # noqa: ANN001
    cos_sin,  # noqa: ANN001
    positions,  # noqa: ANN001
    slots,  # noqa: ANN001
    keys,  # noqa: ANN001
    values,  # noqa: ANN001
    row,  # noqa: ANN001
    key_row,  # noqa: ANN001
    value_row,  # noqa: ANN001
    QUERIES: tl.constexpr,
    GROUPS: tl.constexpr,
    HALF: tl.constexpr,
    HEADS: tl.constexpr,
    residual,  # noqa: ANN001
    WIDTH: tl.constexpr,
    SPAN: tl.constexpr,
    EARLY: tl.constexpr,
):
    token = tl.cast(tl.program_id(0), tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)[:, None]
    i = tl.arange(0, HALF)[None, :]
    there = (head < QUERIES + 2 * GROUPS) & (i < HALF)
    is_query = head < QUERIES
    is_key = (head >= QUERIES) & (head < QUERIES + GROUPS)
    is_value = (head >= QUERIES + GROUPS) & there
    query_1, query_2 = tl.load(query_weight + i), tl.load(query_weight + HALF + i)
    key_1, key_2 = tl.load(key_weight + i), tl.load(key_weight + HALF + i)
    weight_1 = tl.where(is_query, query_1, key_1).to(tl.float32)
    weight_2 = tl.where(is_query, query_2, key_2).to(tl.float32)
    turn = cos_sin + tl.load(positions + token).to(tl.int64) * 2 * HALF + i
    cos, sin = tl.load(turn), tl.load(turn + HALF)
    slot = tl.load(slots + token).to(tl.int64)
    if EARLY:  # the kernel before this one has ended, the one after it may begin
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()

    source = qkv + token * row + head * 2 * HALF + i
    first = tl.load(source, mask=there, other=0).to(tl.float32)
    second = tl.load(source + HALF, mask=there, other=0).to(tl.float32)
    if WIDTH:
        inverse = inverse_root_mean_square(residual, token, epsilon, WIDTH, SPAN)
        first *= inverse
        second *= inverse
    kind = queries.dtype.element_ty
    scale = tl.rsqrt(tl.sum(first * first + second * second, axis=1) / (2 * HALF) + epsilon)
    x = (first * scale[:, None] * weight_1).to(kind).to(tl.float32)
    y = (second * scale[:, None] * weight_2).to(kind).to(tl.float32)
    x, y = x * cos - y * sin, y * cos + x * sin
    target = queries + token * QUERIES * 2 * HALF + head * 2 * HALF + i
    tl.store(target, x.to(kind), mask=is_query)
    tl.store(target + HALF, y.to(kind), mask=is_query)
    target = keys + slot * key_row + (head - QUERIES) * 2 * HALF + i
    tl.store(target, x.to(kind), mask=is_key)
    tl.store(target + HALF, y.to(kind), mask=is_key)
    target = values + slot * value_row + (head - QUERIES - GROUPS) * 2 * HALF + i
    tl.store(target, first.to(kind), mask=is_value)
    tl.store(target + HALF, second.to(kind), mask=is_value)
