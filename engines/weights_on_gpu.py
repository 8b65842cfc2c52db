"""Weights that stay on the GPU: checksums that it computes itself, and a way to servers beside us.

A host reads weights at a few GB/s and hashes them at less; the GPU that holds them reads them at a
thousand times that. So a digest of weights on a GPU is made of sums over their words, and what a
server has to answer is computed by SGLang's own kernel.
"""

import base64
import contextlib
import functools
import hashlib
import importlib.util
import io
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import httpx
import torch
from torch import Tensor

from .checksums import EXPERT, FUSED, PADDED, Named, bytes_of, padded, server_name
from .weights import Post, bucket_layout, post_tensors

KIND = "words-"
"""What a digest of this kind begins with; one of :class:`~.checksums.Tally` is plain sha256."""

BUCKET_BYTES = 2 << 30
"""Of a bucket that a server maps: each costs a request, and as much of the GPU's memory."""
CHUNK_WORDS = 1 << 24
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
        self._sums: list[Tensor] = []
        self._begun: dict[str, list[Tensor]] = {}
        self._checksums: dict[str, str] = {}

    def add(self, name: str, tensor: Tensor) -> None:
        """Count one tensor. Parts of a fused tensor come in their order (q, k, v; gate, up)."""
        self.bytes += tensor.nbytes
        self._labels.append(f"{name} {tensor.dtype} {tuple(tensor.shape)}")
        self._sums.append(word_sum(tensor))
        if not self._for_servers:
            return
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
            self._checksums[fused] = server_checksum(torch.cat(parts) if whole > 1 else parts[0])
            del self._begun[fused]

    def digest(self) -> str:
        """:func:`~.checksums.weights_digest` of everything added."""
        sums = torch.stack(self._sums).tolist() if self._sums else []
        lines = sorted(f"{label} {total}" for label, total in zip(self._labels, sums, strict=True))
        return KIND + hashlib.sha256("\n".join(lines).encode()).hexdigest()

    def server_checksums(self) -> dict[str, str]:
        """What ``/weights_checker`` of a single-GPU server says of these weights."""
        return self._checksums


def word_sum(tensor: Tensor) -> Tensor:
    """Sum over the tensor's 32-bit words, each times a key of its place, modulo 2^64; int64 [].

    The same on any device. Every key is odd, so no single changed word goes unnoticed; other
    changes do with a probability of about 2^-32 (multilinear hashing, Lemire and Kaser 2013).
    """
    flat_B = bytes_of(tensor)
    if missing := -len(flat_B) % 4:
        flat_B = torch.cat([flat_B, flat_B.new_zeros(missing)])
    words_W = flat_B.view(torch.int32)
    if words_W.is_cuda:
        from .word_sum_kernel import sum_words

        return sum_words(words_W, KEY_STEP, KEY_MIX)
    return _sum_words(words_W)


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


def server_checksum(tensor: Tensor) -> str:
    """SGLang's checksum of a tensor on a GPU, 16 hexadecimal digits."""
    return f"{_sglang_hash()(tensor):016x}"


@functools.cache
def _sglang_hash() -> Callable[[Tensor], int]:
    """The kernel's own file, without what ``import sglang`` would load."""
    package = importlib.util.find_spec("sglang")
    assert package is not None
    assert package.origin is not None
    file = Path(package.origin).with_name("kernels") / "ops" / "memory" / "gpu_tensor_hash.py"
    spec = importlib.util.spec_from_file_location("rollflow_sglang_gpu_hash", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.gpu_tensor_hash


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


def _post(content: dict[str, Any], client: httpx.Client, version: int | None) -> None:
    # Pickled for each server: torch counts those that mapped the memory.
    buffer = io.BytesIO()
    ForkingPickler(buffer).dump(content)
    post_tensors(base64.b64encode(buffer.getvalue()).decode(), client, version)
