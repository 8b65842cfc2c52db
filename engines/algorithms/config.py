"""Settings of the algorithms: one class each, chosen by ``algorithm.name``."""

from typing import Annotated, Literal

from pydantic import Field

from rollflow.storage.config import Config


class GrpoConfig(Config):
    """Group relative policy optimisation (arXiv:2402.03300), clip-higher of DAPO (arXiv:2503.14476)."""

    name: Literal["grpo"] = "grpo"
    normalize_std: bool = True
    """Divide group advantages by the group's standard deviation (off: Dr.GRPO, arXiv:2503.20783)."""
    eps_clip: float = Field(default=0.2, gt=0, lt=1)
    eps_clip_high: float = Field(default=0.28, gt=0)
    reduction: Literal["token", "sequence"] = "token"
    """Mean over all tokens of the batch, or mean over samples of each sample's token mean."""
    kl_coef: float = Field(default=0.0, ge=0)
    """Weight of the KL to the reference policy (the run's first weights) in the loss."""
    kl_type: Literal["k1", "k2", "k3"] = "k3"
    entropy_coef: float = Field(default=0.0, ge=0)


class SftConfig(Config):
    """Supervised fine-tuning: mean negative log-likelihood of the labels."""

    name: Literal["sft"] = "sft"
    reduction: Literal["token", "sequence"] = "token"


AlgorithmConfig = Annotated[GrpoConfig | SftConfig, Field(discriminator="name")]
