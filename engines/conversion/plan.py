"""Which part of a torch_dist checkpoint holds which Hugging Face tensor.

Taken from the model itself: megatron-core's GPT model is built without memory (on PyTorch's meta
device), asked for its sharded state, and mbridge for the names.
"""

import contextlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from torch import Tensor

from rollflow.engines.config import ModelConfig
from rollflow.engines.cpu.megatron import cuda_means_cpu
from rollflow.engines.megatron import parallel
from rollflow.engines.megatron.loading import wanted_tensors
from rollflow.engines.megatron.model import build_empty
from rollflow.engines.megatron.settings import split_settings

HashStore = dist.HashStore  # pyright: ignore[reportPrivateImportUsage]


@dataclass(frozen=True, slots=True)
class Region:
    """A block of a tensor of the checkpoint, e.g. layer 3 of all layers' output projections."""

    key: str
    whole: tuple[int, ...]
    offset: tuple[int, ...]
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Weight:
    """A parameter of megatron-core's model, the regions that hold it and what it is made of."""

    name: str
    regions: tuple[Region, ...]
    """Along the parameter's first dimension."""
    shape: tuple[int, ...]
    parts: dict[str, tuple[int, ...]]
    """Hugging Face names and shapes."""


@dataclass(frozen=True)
class Plan:
    """All weights of a model, in the order in which they are converted."""

    bridge: Any
    weights: tuple[Weight, ...]

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Hugging Face names and shapes."""
        return {n: shape for weight in self.weights for n, shape in weight.parts.items()}

    def to_megatron(self, weight: Weight, parts: list[Tensor]) -> Tensor:
        """megatron-core's parameter from the Hugging Face tensors."""
        with torch.no_grad():
            return self.bridge._weight_to_mcore_format(weight.name, parts)

    def to_hugging_face(self, weight: Weight, whole: Tensor) -> dict[str, Tensor]:
        """The Hugging Face tensors of megatron-core's parameter."""
        with torch.no_grad():
            names, tensors = self.bridge._weight_to_hf_format(weight.name, whole)
        return {n: t.contiguous() for n, t in zip(names, tensors, strict=True)}


@contextlib.contextmanager
def planned(folder: Path, *, trust_remote_code: bool = False) -> Iterator[Plan]:
    """The plan of the model that ``folder``'s config.json describes; no weights are needed.

    Raises:
        ValueError: the architecture is not supported.
    """
    settings = split_settings({})
    config = ModelConfig(path=str(folder), trust_remote_code=trust_remote_code)
    dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    try:
        parallel.make_groups(settings, 0, timeout_s=60)
        with contextlib.redirect_stdout(sys.stderr):
            bridge, chunk = build_empty(config, settings)
        yield Plan(bridge, tuple(_weights(bridge, chunk)))
    finally:
        parallel.leave()


def _weights(bridge: Any, chunk: Any) -> Iterator[Weight]:
    with cuda_means_cpu():
        state = chunk.sharded_state_dict()
    local_names = bridge._weight_name_mapping_mcore_local_to_global(chunk)
    seen: set[str] = set()
    for local, (parameter, name, parts) in zip(
        local_names, wanted_tensors(bridge, [chunk]), strict=True
    ):
        if parts.keys() <= seen:
            continue
        seen |= parts.keys()
        sharded = state[local]
        pieces: Any = sharded.build() if isinstance(sharded, ShardedTensorFactory) else [sharded]
        regions = tuple(_region(piece) for piece in pieces)
        yield Weight(name, regions, tuple(parameter.shape), parts)


def _region(piece: ShardedTensor) -> Region:
    front = (1,) * piece.prepend_axis_num
    return Region(
        piece.key, tuple(piece.global_shape), tuple(piece.global_offset), front + piece.local_shape
    )
