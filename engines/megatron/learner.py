"""What a training step works on: models, optimizers, settings."""

from dataclasses import dataclass

from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from rollflow.engines.algorithms.config import AlgorithmConfig
from rollflow.engines.algorithms.inputs import AdvantageFn, LossFn

from .config import GatesConfig, TrainerConfig
from .critic import Critic
from .model import Model
from .reference import Reference


@dataclass(frozen=True)
class Learner:
    """What a step works on and by which rules."""

    model: Model
    optimizer: MegatronOptimizer
    scheduler: OptimizerParamScheduler
    reference: Reference | None
    """The run's first weights; only where the loss has a KL term."""
    algorithm: AlgorithmConfig
    trainer: TrainerConfig
    gates: GatesConfig
    temperature: float
    """Of the rollout's sampling: log-probabilities are of the distribution it drew from."""
    device: str
    critic: Critic | None = None
    """PPO's value model; with it a step trains two models."""
    own_advantage: AdvantageFn | None = None
    """The function that ``algorithm.advantage`` names, where it names one."""
    own_loss: LossFn | None = None
