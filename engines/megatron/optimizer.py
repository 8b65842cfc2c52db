"""Optimizer and learning-rate schedule: megatron-core's own, set up from the settings."""

from typing import Any

import torch
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from rollflow.engines.cpu.megatron import cuda_means_cpu

from .config import TrainerConfig
from .gates import check_gradient
from .model import Model
from .optimizer_state import each_optimizer
from .settings import Settings

DEFAULTS: dict[str, Any] = {"lr": 1e-6, "min_lr": 0.0, "clip_grad": 1.0}
"""Where the ``[megatron]`` table is silent and megatron-core has no default or one for pretraining."""


def build_optimizer(
    model: Model, settings: Settings, trainer: TrainerConfig, total_steps: int
) -> tuple[MegatronOptimizer, OptimizerParamScheduler]:
    """Adam over the model's parameters, and its schedule over ``total_steps`` batches.

    Raises:
        ValueError: the warmup, or the decay of WSD, leaves the other parts of the schedule no room.
    """
    values = DEFAULTS | settings.optimizer
    bf16 = model.dtype is torch.bfloat16
    config = OptimizerConfig(**{**values, "bf16": bf16, "params_dtype": model.dtype})
    trainer.check_schedule(total_steps)
    decay = trainer.decay_updates(total_steps)
    with cuda_means_cpu():
        optimizer = get_megatron_optimizer(config, model.chunks)
    if model.on_gpu:
        _fuse(optimizer)
    scheduler = OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=values["lr"],
        min_lr=values["min_lr"],
        lr_warmup_steps=trainer.lr_warmup_steps,
        lr_decay_steps=decay,
        lr_decay_style=trainer.lr_decay_style,
        wsd_decay_steps=trainer.lr_wsd_decay_steps,
        lr_wsd_decay_style=trainer.lr_wsd_decay_style,
        start_wd=config.weight_decay,
        end_wd=config.weight_decay,
        wd_incr_steps=decay,
        wd_incr_style="constant",
        # A checkpoint says how far the schedule is; what it is are the settings, also of a fork.
        use_checkpoint_opt_param_scheduler=False,
        override_opt_param_scheduler=True,
    )
    return optimizer, scheduler


def _fuse(optimizer: MegatronOptimizer) -> None:
    """One kernel for the whole of torch's Adam, which megatron-core takes without others installed."""
    for one in each_optimizer(optimizer):
        if isinstance(inner := getattr(one, "optimizer", None), torch.optim.Adam):
            for group in inner.param_groups:
                group.update(fused=True, foreach=False)


def update(
    optimizer: MegatronOptimizer, scheduler: OptimizerParamScheduler, step: int
) -> tuple[float, float]:
    """One update from the gradients that stand; gives (gradient norm before clipping, its rate).

    The schedule advances first: update n of a warmup of w has n/w of the rate, never 0.

    Raises:
        GateError: the gradient is not finite; neither weights nor schedule were touched.
    """
    with cuda_means_cpu():
        optimizer.prepare_grads()
        grad_norm = float(optimizer.get_grad_norm())
        check_gradient(grad_norm, step)
        scheduler.step(1)
        optimizer.step()
    return grad_norm, float(optimizer.param_groups[0]["lr"])
