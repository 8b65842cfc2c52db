"""The checksums that an SGLang server on a GPU tells of its weights, of many tensors at once.

SGLang computes them one tensor after another and waits for each: 34 ms for the 226 tensors of Qwen3-0.6B,
which the GPU reads in one. The definition is SGLang's ``gpu_tensor_hash``, told here again
so that one launch can take all of them; ``tests/gpu`` compares the two.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

SEED = 0x243F6A88
SEEDS = SEED, ((SEED * 0x9E3779B1) ^ 0xDEADBEEF) & 0xFFFFFFFF
TILE = 8192
"""Words that are summed before they are mixed with the tensor's size."""
_32, _64 = (1 << 32) - 1, (1 << 64) - 1


def checksums(tensors: Sequence[Tensor]) -> list[str]:
    """Of each tensor 16 hexadecimal digits; all of them on one device."""
    some = [tensor for tensor in tensors if tensor.numel()]
    if some and some[0].is_cuda:
        from .sums_kernel import hash_words

        found = iter(hash_words([of_words(t) for t in some], SEEDS, TILE).tolist())
    else:
        found = iter([hash_of_words(words_of(t)) for t in some])
    return [f"{_last_mixing(next(found)) if t.numel() else 0:016x}" for t in tensors]


def of_words(tensor: Tensor) -> Tensor:
    """The tensor itself where its memory is 32-bit words in order, for a kernel that is told where it
    lies: a view for each of hundreds would take longer than the kernel. Else its words."""
    plain = tensor.is_contiguous() and not (tensor.nbytes | tensor.data_ptr()) & 3
    return tensor if plain else words_of(tensor)


def words_of(tensor: Tensor) -> Tensor:
    """The tensor's bytes in order as 32-bit words, int32 [W]; zeros fill the last one."""
    flat_B = tensor.detach().contiguous().flatten().view(torch.uint8)
    if missing := -len(flat_B) % 4:
        flat_B = torch.cat([flat_B, flat_B.new_zeros(missing)])
    return flat_B.view(torch.int32)


def hash_of_words(words_W: Tensor) -> int:
    """A sum modulo 2^64 over tiles of words, each mixed with its place; before the last mixing."""
    total, size = 0, 4 * len(words_W)
    for start in range(0, len(words_W), TILE):
        word_w = words_W[start : start + TILE].long() & _32
        place_w = torch.arange(start, start + len(word_w)) & _32
        sums = [
            int(_mixed(word_w ^ ((place_w * step + seed) & _32) ^ _turned(place_w, bits)).sum())
            for step, seed, bits in ((0x27D4EB2D, SEEDS[0], 15), (0x165667B1, SEEDS[1], 13))
        ]
        high, low = (int(_mixed(torch.tensor((s ^ size) & _32))) for s in sums)
        total += high << 32 | low
    return total & _64


def _turned(x: Tensor, bits: int) -> Tensor:
    return ((x << bits) | (x >> (32 - bits))) & _32


def _mixed(x: Tensor) -> Tensor:
    """MurmurHash3's last step, on 32-bit numbers."""
    x = _times(x ^ x >> 16, 0x85EBCA6B)
    x = _times(x ^ x >> 13, 0xC2B2AE35)
    return x ^ x >> 16


def _times(x: Tensor, factor: int) -> Tensor:
    """The product modulo 2^32: what overflows 64 bits are multiples of that."""
    return (x * factor) & _32


def _last_mixing(x: int) -> int:
    """splitmix64's."""
    x &= _64
    x = ((x ^ x >> 30) * 0xBF58476D1CE4E5B9) & _64
    x = ((x ^ x >> 27) * 0x94D049BB133111EB) & _64
    return x ^ x >> 31
