"""Weights that stay on the GPU: checksums that it computes itself, and a way to servers beside us.

A host reads weights at a few GB/s and hashes them at less; the GPU that holds them reads them at a
thousand times that. So a digest of weights on a GPU is made of sums over their words. Both those and
what a server has to answer are computed for many tensors at once: a launch and an answer for each
would take longer than the sums.
"""

import base64
import contextlib
import functools
import hashlib
import io
from collections.abc import Iterator, Sequence
from multiprocessing.reduction import ForkingPickler
from typing import Any

import httpx
import torch
from torch import Tensor

from .checksums import PADDED, Named, bytes_of, padded
from .gpu.server_sums import checksums, of_words, words_of
from .gpu.told import Told
from .server_names import EXPERT, FUSED, server_name
from .weights import Post, bucket_layout, post_tensors

KIND = "words-"
"""What a digest of this kind begins with; one of :class:`~.checksums.Tally` is plain sha256."""

BUCKET_BYTES = 2 << 30
"""Of a bucket that a server maps: each costs a request, and as much of the GPU's memory."""
CHUNK_WORDS = 1 << 24
HELD_BYTES = 4 << 30
"""Of tensors that are kept until their sums are computed, all at once."""
KEY_STEP, KEY_MIX = -7046029254386353131, -4658895280553007687
"""Odd numbers of 64 bits: the golden ratio, and a multiplier of splitmix64."""

PADDED_ON_GPU = {name: PADDED[name] for name in ("embed_tokens.weight", "lm_head.weight")}
PARTS = {
    fused: sum(other == fused for other, _ in FUSED.values()) for fused in dict(FUSED.values())
}
"""SGLang's fused module -> of how many it is made."""


class GpuTally:
    """As :class:`~.checksums.Tally`, without bringing a weight to the host.

    ``for_servers``: the checksums that servers have to answer are wanted too.
    """

    def __init__(self, *, for_servers: bool) -> None:
        self.bytes = 0
        self._for_servers = for_servers
        self._labels: list[str] = []
        self._sums: list[int] = []
        self._begun: dict[str, list[Tensor]] = {}
        self._checksums: dict[str, str] = {}
        self._held: list[Tensor] = []
        """Whose sums are not computed yet."""
        self._held_fused: dict[str, Tensor] = {}
        self._held_bytes = 0

    def add(self, name: str, tensor: Tensor) -> None:
        """Count one tensor. Parts of a fused tensor come in their order (q, k, v; gate, up).

        It may not change before :meth:`digest` or :meth:`server_checksums` is asked for.
        """
        self.bytes += tensor.nbytes
        self._labels.append(f"{name} {tensor.dtype} {tuple(tensor.shape)}")
        self._held.append(tensor)
        self._held_bytes += tensor.nbytes
        if self._for_servers:
            self._add_fused(name, tensor)
        if self._held_bytes > HELD_BYTES:
            self._settle()

    def _add_fused(self, name: str, tensor: Tensor) -> None:
        fused, place = server_name(name)
        if EXPERT.fullmatch(name):
            raise ValueError(
                f"{name}: what a GPU server holds of a mixture of experts cannot be verified in this "
                "version; give cluster.device = 'cpu', or a dense model"
            )
        parts = self._begun.setdefault(fused, [])
        if place != len(parts):
            raise ValueError(
                f"{name} came as part {len(parts)} of {fused} but is part {place}; "
                "export the parts of a fused weight in order"
            )
        parts.append(padded(name, tensor.detach(), PADDED_ON_GPU))
        whole = next((n for module, n in PARTS.items() if f".{module}." in fused), 1)
        if len(parts) == whole:
            self._held_fused[fused] = torch.cat(parts) if whole > 1 else parts[0]
            del self._begun[fused]

    def _settle(self) -> None:
        self._sums += word_sums(self._held)
        found = checksums(list(self._held_fused.values()))
        self._checksums.update(zip(self._held_fused, found, strict=True))
        self._held, self._held_fused, self._held_bytes = [], {}, 0

    def digest(self) -> str:
        """:func:`~.checksums.weights_digest` of everything added."""
        self._settle()
        lines = sorted(f"{label} {n}" for label, n in zip(self._labels, self._sums, strict=True))
        return KIND + hashlib.sha256("\n".join(lines).encode()).hexdigest()

    def server_checksums(self) -> dict[str, str]:
        """What ``/weights_checker`` of a single-GPU server says of these weights."""
        self._settle()
        return self._checksums


def word_sum(tensor: Tensor) -> int:
    """Sum over the tensor's 32-bit words, each times a key of its place, modulo 2^64, with a sign.

    The same on any device. Every key is odd, so no single changed word goes unnoticed; other
    changes do with a probability of about 2^-32 (multilinear hashing, Lemire and Kaser 2013).
    """
    return word_sums([tensor])[0]


def word_sums(tensors: Sequence[Tensor]) -> list[int]:
    """:func:`word_sum` of each, all of them on one device."""
    if tensors and tensors[0].is_cuda:
        from .gpu.sums_kernel import sum_words

        return sum_words([of_words(t) for t in tensors], KEY_STEP, KEY_MIX).tolist()
    return [int(_sum_words(words_of(t))) for t in tensors]


def _sum_words(words_W: Tensor) -> Tensor:
    total = torch.zeros((), dtype=torch.int64, device=words_W.device)
    for start in range(0, len(words_W), CHUNK_WORDS):
        part_w = words_W[start : start + CHUNK_WORDS]
        keys_w = torch.arange(start + 1, start + 1 + len(part_w), device=words_W.device)
        keys_w.mul_(KEY_STEP)
        keys_w.bitwise_xor_(keys_w >> 32).mul_(KEY_MIX)
        keys_w.bitwise_xor_(keys_w >> 29).bitwise_or_(1)
        total += keys_w.mul_(part_w).sum()
    return total


@contextlib.contextmanager
def cuda_ipc(bucket: Sequence[Named]) -> Iterator[Post]:
    """A transport to servers on the same GPU: they map the bucket that stands in its memory.

    The bucket is one copy inside the GPU. It is given back once the servers have answered.
    """
    places, _ = bucket_layout(bucket)
    flat = [bytes_of(tensor) for _, tensor in bucket]
    content = {"flattened_tensor": torch.cat(flat), "metadata": places}
    # Another process reads it: no order of this one's stream reaches there.
    torch.cuda.current_stream().synchronize()
    try:
        yield functools.partial(_post, content)
    finally:
        content.clear()
        torch.cuda.ipc_collect()


def _post(content: dict[str, Any], client: httpx.Client, version: int | None) -> Told | None:
    # Pickled for each server: torch counts those that mapped the memory.
    buffer = io.BytesIO()
    ForkingPickler(buffer).dump(content)
    return post_tensors(base64.b64encode(buffer.getvalue()).decode(), client, version)
