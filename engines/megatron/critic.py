"""PPO's critic: the policy's architecture on the same ranks, with a head of one output."""

import dataclasses
from dataclasses import dataclass

from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from rollflow.engines.algorithms.config import CriticConfig
from rollflow.engines.config import ModelConfig

from .config import TrainerConfig
from .model import Model, build_model
from .optimizer import build_optimizer
from .settings import Settings


@dataclass(frozen=True)
class Critic:
    """A value model and what trains it. Its head starts at 0: every first value is 0."""

    model: Model
    optimizer: MegatronOptimizer
    scheduler: OptimizerParamScheduler
    config: CriticConfig


def build_critic(
    config: CriticConfig,
    policy: ModelConfig,
    settings: Settings,
    trainer: TrainerConfig,
    total_steps: int,
    device: str,
) -> Critic:
    """Build this rank's part; after the policy, whose random numbers it would change before it.

    It shares the policy's layout of ranks and its optimizer's settings but for the rates.
    """
    source = policy
    if config.path:
        source = policy.model_copy(update={"path": config.path, "random_weights": False})
    model = build_model(source, settings, device, value_head=True)
    rates = dataclasses.replace(settings, optimizer={**settings.optimizer, "lr": config.lr})
    schedule = trainer.model_copy(update={"lr_warmup_steps": config.lr_warmup_steps})
    optimizer, scheduler = build_optimizer(model, rates, schedule, total_steps)
    return Critic(model, optimizer, scheduler, config)
