"""Optimizer state as megatron-core's sharded tensors, whichever way the parameters are laid out.

Each of Adam's moments (and the float32 copy of a bfloat16 weight) is stored beside the model under
the parameter's own sharding. What is stored depends neither on tensor, pipeline, data or expert
parallel sizes nor on whether the optimizer is distributed, so each of them may differ on loading.

megatron-core's own way is not taken: without TransformerEngine and Apex, version 0.16.1 refuses to
load a distributed optimizer that never stepped, cannot write into its float32 weights, and gives
all parameters one shared step tensor, which every update then advances once for each parameter.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.optimizer import (
    get_param_id_to_sharded_param_map,
    make_sharded_optimizer_tensor,
)
from torch import Tensor

MOMENTS = {"adam": ("exp_avg", "exp_avg_sq"), "sgd": ("momentum_buffer",)}
"""Names of the state tensors of each optimizer that can be restored."""
MAIN = "main"
"""Float32 copy of a weight that the model has in lower precision."""


@dataclass(frozen=True, slots=True)
class _Slot:
    """A parameter of the model and what the optimizer keeps for it on this rank."""

    parameter: Tensor
    inner: Any
    """The torch optimizer."""
    main: Tensor | None
    """What it updates: the parameter, its copy, or this rank's part of either; None: no part here."""
    part: slice | None
    """Of the flattened parameter; None where ranks hold it whole."""
    group: Any
    """Ranks among which the parts are spread."""


def optimizer_state(
    optimizer: Any, model_state: dict[str, Any], *, is_loading: bool
) -> dict[str, Any]:
    """What to save, or what to load into; every rank takes part.

    ``model_state`` is the sharded state of the model. Give what was loaded to
    :func:`restore_optimizer`.
    """
    slots = list(_slots(optimizer))
    parameters: list[Any] = [slot.parameter for slot in slots]
    sharded = get_param_id_to_sharded_param_map(model_state, parameters)
    state: dict[str, Any] = {}
    for number, slot in enumerate(slots):
        for name in _names(optimizer, slot):
            if is_loading:
                tensor = torch.empty_like(slot.parameter, dtype=torch.float32)
            else:
                tensor = _whole(slot, name)
            state[f"{number}.{name}"] = make_sharded_optimizer_tensor(
                sharded[number], tensor, f"optimizer.{name}"
            )
    return {"step": _step(slots), "state": state}


@torch.no_grad()
def restore_optimizer(optimizer: Any, loaded: dict[str, Any]) -> None:
    """Put what :func:`optimizer_state` saved back in place."""
    step = float(loaded["step"])
    for number, slot in enumerate(_slots(optimizer)):
        if slot.main is None:
            continue
        own: dict[str, Any] = {}
        for name in _names(optimizer, slot):
            tensor: Tensor = loaded["state"][f"{number}.{name}"]
            part = tensor if slot.part is None else tensor.flatten()[slot.part]
            if name == MAIN:
                slot.main.copy_(part)
            else:
                own[name] = part.clone()
        if step and not _counts_in_groups(slot.inner):
            # A tensor of its own for each parameter: every update advances it once.
            fused = any(group.get("fused") for group in slot.inner.param_groups)
            own["step"] = torch.tensor(step, device=slot.main.device if fused else "cpu")
        slot.inner.state[slot.main] = own if step else {}
    for inner in {id(s.inner): s.inner for s in _slots(optimizer)}.values():
        if _counts_in_groups(inner):
            for group in inner.param_groups:
                group["step"] = int(step)


def each_optimizer(optimizer: Any) -> list[Any]:
    """The optimizers that one of megatron-core's is made of: experts have their own."""
    return list(getattr(optimizer, "chained_optimizers", [optimizer]))


def _slots(optimizer: Any) -> Iterator[_Slot]:
    for one in each_optimizer(optimizer):
        if one.is_stub_optimizer:
            continue
        if hasattr(one, "model_param_gbuf_map"):
            yield from _distributed_slots(one)
        elif hasattr(one, "float16_groups"):
            pairs = zip(one.float16_groups, one.fp32_from_float16_groups, strict=True)
            for models, mains in pairs:
                for model, main in zip(models, mains, strict=True):
                    yield _Slot(model, one.optimizer, main, None, None)
            for parameters in one.fp32_from_fp32_groups:
                yield from (_Slot(p, one.optimizer, p, None, None) for p in parameters)
        else:
            for group in one.optimizer.param_groups:
                yield from (_Slot(p, one.optimizer, p, None, None) for p in group["params"])


def _distributed_slots(one: Any) -> Iterator[_Slot]:
    for buffer in one.buffers:
        for parameter in buffer.params:
            main, part = None, slice(0, 0)
            if parameter in one.model_param_gbuf_map:
                place = one._get_model_param_range_map(parameter)["param"]
                group, order = one.model_param_group_index_map[parameter]
                main = one.optimizer.param_groups[group]["params"][order]
                part = slice(place.start, place.end)
            yield _Slot(parameter, one.optimizer, main, part, one.data_parallel_group)


def _names(optimizer: Any, slot: _Slot) -> tuple[str, ...]:
    names = MOMENTS[optimizer.config.optimizer]
    return names if slot.parameter.dtype is torch.float32 else (*names, MAIN)


def _whole(slot: _Slot, name: str) -> Tensor:
    """The state tensor in the parameter's shape; parts are put together. Zeros before any update."""
    state = {} if slot.main is None else slot.inner.state.get(slot.main, {})
    own = slot.main if name == MAIN else state.get(name)
    if slot.part is None:
        return torch.zeros_like(slot.parameter) if own is None else own.detach()
    whole = torch.zeros(slot.parameter.numel(), dtype=torch.float32, device=slot.parameter.device)
    if own is not None:
        whole[slot.part] = own.detach()
    dist.all_reduce(whole, group=slot.group)
    return whole.view(slot.parameter.shape)


def _step(slots: list[_Slot]) -> float:
    """Updates so far; all parameters were updated together."""
    for slot in slots:
        if slot.main is not None:
            if _counts_in_groups(slot.inner):
                return float(slot.inner.param_groups[0].get("step", 0))
            return float(slot.inner.state.get(slot.main, {}).get("step", 0))
    return 0.0


def _counts_in_groups(inner: Any) -> bool:
    """The fused optimizers of TransformerEngine and Apex count updates by group of parameters."""
    return not isinstance(inner, torch.optim.Optimizer) or type(inner).__name__ == "FusedAdam"
