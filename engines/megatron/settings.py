"""The ``[megatron]`` table, sorted into megatron-core's own settings classes.

A name may stand in several classes (``use_distributed_optimizer``); it then means the same in each.
What rollflow decides itself is refused by name, and so is a name that no class knows.
"""

import dataclasses
import difflib
from collections.abc import Mapping
from typing import Any

from .config import MEGATRON_OWNED

PARALLEL = (
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "context_parallel_size",
    "expert_model_parallel_size",
    "expert_tensor_parallel_size",
)

UNFINISHED = ("virtual_pipeline_model_parallel_size",)


@dataclasses.dataclass(frozen=True)
class Settings:
    """The table's values by the class that takes them; classes keep their own defaults."""

    transformer: dict[str, Any]
    optimizer: dict[str, Any]
    ddp: dict[str, Any]
    tensor_parallel: int
    pipeline_parallel: int
    context_parallel: int
    expert_parallel: int
    expert_tensor_parallel: int

    def data_parallel(self, world_size: int) -> int:
        """Copies of the model that ``world_size`` ranks hold.

        Raises:
            ValueError: the ranks cannot be divided so.
        """
        width = self.tensor_parallel * self.pipeline_parallel * self.context_parallel
        if world_size % width:
            raise ValueError(
                f"trainer.ranks is {world_size}, not a multiple of tensor x pipeline x context "
                f"parallel size = {width}; change one of them"
            )
        experts = self.expert_parallel * self.expert_tensor_parallel * self.pipeline_parallel
        if world_size % experts:
            raise ValueError(
                f"trainer.ranks is {world_size}, not a multiple of expert x expert tensor x "
                f"pipeline parallel size = {experts}; change one of them"
            )
        return world_size // width


def split_settings(megatron: Mapping[str, Any]) -> Settings:
    """Sort the ``[megatron]`` table by megatron-core's classes.

    Raises:
        ValueError: an unknown name (with the nearest known one), or one that rollflow decides.
    """
    from megatron.core.distributed import DistributedDataParallelConfig
    from megatron.core.optimizer import OptimizerConfig
    from megatron.core.transformer import TransformerConfig

    parts: list[dict[str, Any]] = []
    known: set[str] = set()
    for cls in (TransformerConfig, OptimizerConfig, DistributedDataParallelConfig):
        names = {f.name for f in dataclasses.fields(cls) if f.init}
        parts.append({k: v for k, v in megatron.items() if k in names})
        known |= names
    for name, value in megatron.items():
        _refuse(name, value, known)
    sizes = [int(megatron.get(name, 1)) for name in PARALLEL[:-1]]
    # megatron-core gives experts the tensor parallel size of the rest, if not told otherwise.
    sizes.append(int(megatron.get(PARALLEL[-1], sizes[0])))
    for name, size in zip(PARALLEL, sizes, strict=True):
        if size < 1:
            raise ValueError(f"megatron.{name} is {size}; it counts ranks, so give 1 or more")
    if megatron.get("sequence_parallel") and sizes[0] == 1:
        raise ValueError(
            "megatron.sequence_parallel is true but tensor_model_parallel_size is 1: there is no "
            "other rank to share a sequence with; remove it or raise the size"
        )
    transformer = {k: v for k, v in parts[0].items() if k not in PARALLEL}
    return Settings(transformer, parts[1], parts[2], *sizes)


def _refuse(name: str, value: Any, known: set[str]) -> None:
    if name in MEGATRON_OWNED:
        raise ValueError(
            f"megatron.{name} = {value!r} cannot be set: {MEGATRON_OWNED[name]}; remove it"
        )
    if name in UNFINISHED and value not in (None, 1):
        raise ValueError(f"megatron.{name} = {value!r} is not supported in this version; remove it")
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else "no class of megatron-core has it"
        raise ValueError(f"megatron.{name} is not a setting of megatron-core: {hint}")
