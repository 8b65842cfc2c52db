"""Checksums of weights: a digest that names a whole set, and what a server says of the same weights.

SGLang fuses and pads some tensors, so its names and bytes are other than Hugging Face's. Importing
this module loads no engine.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from .server_names import EXPERT, server_name

if TYPE_CHECKING:
    from torch import Tensor

    from .weights_on_gpu import GpuTally

Named = tuple[str, "Tensor"]

PADDED = {
    "embed_tokens.weight": (0, 64),
    "lm_head.weight": (0, 64),
    "gate_proj.weight": (0, 32),
    "up_proj.weight": (0, 32),
    "down_proj.weight": (1, 32),
}
"""Dimension that an SGLang server pads with zeros, and to a multiple of what; the MLP's on a CPU."""


def weights_digest(named: Iterable[Named], like: str = "") -> str:
    """The name of a set of weights: a hash over names, types, shapes and bytes, in any order.

    It is of the kind that ``like`` is, or of that which suits where the weights are: sha256 of
    their bytes on a CPU, sums over their words on a GPU.
    """
    return tally_of(named, like=like).digest()


def tally_of(
    named: Iterable[Named], *, for_servers: bool = False, like: str = ""
) -> Tally | GpuTally:
    """Count all weights; see :func:`tally_for`."""
    tally, named = tally_for(named, for_servers=for_servers, like=like)
    add_all(tally, named)
    return tally


def tally_for(
    named: Iterable[Named], *, for_servers: bool, like: str = ""
) -> tuple[Tally | GpuTally, Iterator[Named]]:
    """(the tally that suits these weights, the weights)."""
    weights = iter(named)
    first = next(weights, None)
    if first is None:
        return Tally(), weights
    weights = itertools.chain([first], weights)
    if not like and not first[1].is_cuda:
        return Tally(), weights
    from . import weights_on_gpu

    if like and not like.startswith(weights_on_gpu.KIND):
        return Tally(), weights
    return weights_on_gpu.GpuTally(for_servers=for_servers), weights


def add_all(tally: Tally | GpuTally, named: Iterable[Named]) -> None:
    """Count each tensor."""
    for name, tensor in named:
        tally.add(name, tensor)


class Tally:
    """Checksums of weights, gathered while they pass by under their Hugging Face names."""

    def __init__(self) -> None:
        self.bytes = 0
        self._lines: list[str] = []
        self._fused: dict[str, tuple[int, Any]] = {}
        self._early: dict[str, dict[int, bytes]] = {}
        """Experts that came before others of their layer, which are on other ranks."""

    def add(self, name: str, tensor: Tensor) -> None:
        """Count one tensor. Parts of a fused tensor come in their order (q, k, v; gate, up), but for
        experts, which may come in any."""
        data = _on_host(tensor)
        self.bytes += len(data)
        own = hashlib.sha256(data).hexdigest()
        self._lines.append(f"{name} {tensor.dtype} {tuple(tensor.shape)} {own}")
        fused, place = server_name(name)
        expected, hasher = self._fused.get(fused, (0, hashlib.sha256()))
        if EXPERT.fullmatch(name):
            early = self._early.setdefault(fused, {})
            early[place] = bytes(_on_host(padded(name, tensor)))
            while expected in early:
                hasher.update(early.pop(expected))
                expected += 1
            self._fused[fused] = (expected, hasher)
            return
        if place != expected:
            raise ValueError(
                f"{name} came as part {expected} of {fused} but is part {place}; "
                "export the parts of a fused weight in order"
            )
        wider = padded(name, tensor)
        hasher.update(data if wider is tensor else _on_host(wider))
        self._fused[fused] = (place + 1, hasher)

    def digest(self) -> str:
        """:func:`weights_digest` of everything added."""
        return hashlib.sha256("\n".join(sorted(self._lines)).encode()).hexdigest()

    def server_checksums(self) -> dict[str, str]:
        """What ``/weights_checker`` of a single-rank CPU server says of these weights.

        Raises:
            ValueError: an expert is missing among those of its layer.
        """
        if gaps := [name for name, early in self._early.items() if early]:
            raise ValueError(f"{gaps[0]} lacks its part {self._fused[gaps[0]][0]}")
        return {name: hasher.digest()[:8].hex() for name, (_, hasher) in self._fused.items()}


def padded(name: str, tensor: Tensor, multiples: Mapping[str, tuple[int, int]] = PADDED) -> Tensor:
    """The tensor as a server keeps it, with its padding; ``multiples`` is as ``PADDED``."""
    for suffix, (dimension, multiple) in multiples.items():
        if name.endswith(suffix) and (missing := -tensor.shape[dimension] % multiple):
            shape = [*tensor.shape]
            shape[dimension] += missing
            wider = tensor.new_zeros(shape)
            wider.narrow(dimension, 0, tensor.shape[dimension]).copy_(tensor.detach())
            return wider
    return tensor


def bytes_of(tensor: Tensor) -> Tensor:
    """The tensor's bytes in order, uint8 [B]."""
    import torch

    return tensor.detach().contiguous().flatten().view(torch.uint8)


def _on_host(tensor: Tensor) -> memoryview:
    return memoryview(bytes_of(tensor).cpu().numpy())  # pyright: ignore[reportArgumentType]
