"""Weights of a Hugging Face checkpoint into this rank's part of the model, every shape checked first."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from mbridge.core import LLMBridge
from megatron.core import parallel_state
from safetensors import safe_open
from torch import Tensor

UNUSED = ("rotary_emb.inv_freq",)
"""Endings of tensors that some checkpoints hold and no model needs."""


class HuggingFaceWeights:
    """The tensors of a folder's safetensors files by name, read one at a time."""

    def __init__(self, folder: str) -> None:
        self._files = [
            safe_open(file, framework="pt", device="cpu")
            for file in sorted(Path(folder).glob("*.safetensors"))
        ]
        if not self._files:
            raise FileNotFoundError(f"model.path is {folder!r}, which has no *.safetensors")
        self._of: dict[str, Any] = {name: f for f in self._files for name in f.keys()}  # noqa: SIM118

    @property
    def names(self) -> set[str]:
        return set(self._of)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._of[name].get_slice(name).get_shape())

    def read(self, name: str) -> Tensor:
        return self._of[name].get_tensor(name)


def load_hugging_face(
    bridge: LLMBridge, chunks: list[Any], folder: str, *, output_layer: bool = True
) -> None:
    """Fill this rank's part from a folder of safetensors; each rank reads what it needs itself.

    Without ``output_layer`` that of the model stays as it is: a critic's has no counterpart.

    Raises:
        ValueError: a tensor is missing, has another shape than config.json asks for, or belongs to
            no parameter; it is named with both shapes. No weight was changed.
    """
    weights = HuggingFaceWeights(folder)
    wanted = list(wanted_tensors(bridge, chunks, () if output_layer else ("output_layer.weight",)))
    expected: dict[str, tuple[int, ...]] = {}
    for _, _, shapes in wanted:
        expected |= shapes
    everyone: list[dict[str, tuple[int, ...]]] = [{}] * dist.get_world_size()
    dist.all_gather_object(everyone, expected)
    check_shapes(
        {name: weights.shape(name) for name in weights.names},
        {name: shape for part in everyone for name, shape in part.items()},
        folder,
    )
    with torch.no_grad():
        for parameter, name, shapes in wanted:
            whole: Any = bridge._weight_to_mcore_format(name, [weights.read(n) for n in shapes])
            size, rank = _split_of(name)
            part = bridge._weight_split_across_tp(name, whole, parameter, size)[rank]
            parameter.copy_(part)


def wanted_tensors(
    bridge: LLMBridge, chunks: list[Any], but: Sequence[str] = ()
) -> Iterator[tuple[Tensor, str, dict[str, tuple[int, ...]]]]:
    """(parameter, megatron-core's name in the whole model, Hugging Face names and shapes) of each.

    ``but`` names parameters that are left out.
    """
    for chunk in chunks:
        names = bridge._weight_name_mapping_mcore_local_to_global(chunk)
        state = chunk.state_dict(keep_vars=True)
        for local, name in names.items():
            if name in but:
                continue
            whole = _whole_shape(state[local], name)
            found, parts = bridge._weight_to_hf_format(name, torch.empty(whole, device="meta"))
            yield state[local], name, {n: tuple(p.shape) for n, p in zip(found, parts, strict=True)}


def check_shapes(
    found: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]], folder: str
) -> None:
    """Every tensor that config.json asks for is there, in its shape, and no other.

    Raises:
        ValueError: names the tensor and both shapes.
    """
    for name, shape in expected.items():
        if name not in found:
            raise ValueError(f"{folder}: {name} is missing; config.json asks for {list(shape)}")
        if found[name] != shape:
            raise ValueError(
                f"{folder}: {name} has shape {list(found[name])}, config.json asks for "
                f"{list(shape)}; the configuration is not the one of these weights"
            )
    tied = {"lm_head.weight"} if "lm_head.weight" not in expected else set()
    if extra := sorted(n for n in found.keys() - expected - tied if not n.endswith(UNUSED)):
        raise ValueError(
            f"{folder}: {extra[0]} {list(found[extra[0]])} belongs to no parameter of the model "
            f"that config.json describes ({len(extra)} such tensors)"
        )


def _whole_shape(parameter: Tensor, name: str) -> list[int]:
    """Shape of the parameter over all tensor parallel ranks."""
    shape = list(parameter.shape)
    if getattr(parameter, "tensor_model_parallel", False):
        shape[getattr(parameter, "partition_dim", 0)] *= _split_of(name)[0]
    return shape


def _split_of(name: str) -> tuple[Any, Any]:
    """(ranks that share the parameter, which of them this is)."""
    if ".mlp.experts." in name:
        return (
            parallel_state.get_expert_tensor_parallel_world_size(),
            parallel_state.get_expert_tensor_parallel_rank(),
        )
    return (
        parallel_state.get_tensor_model_parallel_world_size(),
        parallel_state.get_tensor_model_parallel_rank(),
    )
