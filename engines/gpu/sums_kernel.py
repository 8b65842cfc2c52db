"""Sums over the words of many tensors in one launch each. Importing it needs Triton.

:func:`sum_words` is what :func:`~rollflow.engines.weights_on_gpu.word_sum` defines, :func:`hash_words` what
:func:`~.server_sums.hash_of_words` does. A table has the tensors' addresses, so that hundreds of tensors
cost one launch and one answer. Sums of integers: the order of adding up does not matter.
"""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024
PARTS = 256
"""Programs that share a tensor; those of a small one have nothing to do."""


def sum_words(words: Sequence[Tensor], step: int, mix: int) -> Tensor:
    """``word_sum`` of each tensor, whose memory is 32-bit words in order, int64 [n]."""
    table, totals = _prepared(words)
    kernel: Any = _sum
    kernel[(len(words), PARTS)](table, totals, step, mix, BLOCK, PARTS, num_warps=4)
    return totals


def hash_words(words: Sequence[Tensor], seeds: tuple[int, int], tile: int) -> Tensor:
    """``hash_of_words`` of each such tensor, before its last mixing, int64 [n]."""
    table, totals = _prepared(words)
    kernel: Any = _hash
    kernel[(len(words), PARTS)](table, totals, *seeds, tile, BLOCK, PARTS, num_warps=4)
    return totals


def _prepared(words: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """(address of each tensor and its number of words, a zero for each)."""
    device = words[0].device
    rows = [(tensor.data_ptr(), tensor.nbytes // 4) for tensor in words]
    return (
        torch.tensor(rows, dtype=torch.int64, device=device),
        torch.zeros(len(words), dtype=torch.int64, device=device),
    )


@triton.jit
def _sum(
    table,  # noqa: ANN001 - Triton reads annotations
    totals,  # noqa: ANN001
    STEP: tl.constexpr,
    MIX: tl.constexpr,
    BLOCK: tl.constexpr,
    PARTS: tl.constexpr,
):
    which, part = tl.program_id(0), tl.program_id(1)
    words = tl.load(table + 2 * which).to(tl.pointer_type(tl.int32))
    count = tl.load(table + 2 * which + 1)
    total = tl.zeros((BLOCK,), dtype=tl.int64)
    for block in range(part, tl.cdiv(count, BLOCK), PARTS):
        place = tl.cast(block, tl.int64) * BLOCK + tl.arange(0, BLOCK)
        word = tl.load(words + place, mask=place < count, other=0).to(tl.int64)
        key = (place + 1) * STEP
        key = (key ^ (key >> 32)) * MIX
        key = (key ^ (key >> 29)) | 1
        total += key * word
    tl.atomic_add(totals + which, tl.sum(total))


@triton.jit
def _mixed(x):  # noqa: ANN001
    x ^= x >> 16
    x = x * tl.full((), 0x85EBCA6B, tl.uint32)
    x ^= x >> 13
    x = x * tl.full((), 0xC2B2AE35, tl.uint32)
    x ^= x >> 16
    return x


@triton.jit
def _hash(
    table,  # noqa: ANN001
    totals,  # noqa: ANN001
    FIRST: tl.constexpr,
    SECOND: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
    PARTS: tl.constexpr,
):
    which, part = tl.program_id(0), tl.program_id(1)
    words = tl.load(table + 2 * which).to(tl.pointer_type(tl.uint32))
    count = tl.load(table + 2 * which + 1)
    size = (count * 4).to(tl.uint32)
    total = tl.zeros((), dtype=tl.uint64)
    for tile in range(part, tl.cdiv(count, TILE), PARTS):
        high = tl.zeros((BLOCK,), dtype=tl.uint32)
        low = tl.zeros((BLOCK,), dtype=tl.uint32)
        for block in range(TILE // BLOCK):
            place = tl.cast(tile, tl.int64) * TILE + block * BLOCK + tl.arange(0, BLOCK)
            there = place < count
            word = tl.load(words + place, mask=there, other=0)
            i = place.to(tl.uint32)
            one = (i * tl.full((), 0x27D4EB2D, tl.uint32) + tl.full((), FIRST, tl.uint32)) ^ (
                (i << 15) | (i >> 17)
            )
            two = (i * tl.full((), 0x165667B1, tl.uint32) + tl.full((), SECOND, tl.uint32)) ^ (
                (i << 13) | (i >> 19)
            )
            zero = tl.zeros((BLOCK,), dtype=tl.uint32)
            high += tl.where(there, _mixed(word ^ one), zero)
            low += tl.where(there, _mixed(word ^ two), zero)
        top = _mixed(tl.sum(high, axis=0).to(tl.uint32) ^ size)
        bottom = _mixed(tl.sum(low, axis=0).to(tl.uint32) ^ size)
        total += (top.to(tl.uint64) << 32) | bottom.to(tl.uint64)
    tl.atomic_add(totals + which, total.to(tl.int64, bitcast=True))
