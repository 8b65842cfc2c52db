"""One launch for the sum that :func:`~.weights_on_gpu.word_sum` defines. Importing it needs Triton."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 4096


def sum_words(words_W: Tensor, step: int, mix: int) -> Tensor:
    """As ``word_sum`` of 32-bit words on a GPU. Integers: the order of adding up does not matter."""
    total = torch.zeros((), dtype=torch.int64, device=words_W.device)
    blocks = (triton.cdiv(len(words_W), BLOCK),)
    kernel: Any = _add_blocks
    kernel[blocks](words_W, total, len(words_W), step, mix, BLOCK, num_warps=8)
    return total


@triton.jit
def _add_blocks(
    words,  # noqa: ANN001 - Triton reads annotations
    total,  # noqa: ANN001
    count,  # noqa: ANN001
    STEP: tl.constexpr,
    MIX: tl.constexpr,
    BLOCK: tl.constexpr,
):
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    word = tl.load(words + place, mask=place < count, other=0).to(tl.int64)
    key = (place + 1) * STEP
    key = (key ^ (key >> 32)) * MIX
    key = (key ^ (key >> 29)) | 1
    tl.atomic_add(total, tl.sum(key * word))
