"""Settings of the algorithms: one class each, chosen by ``algorithm.name``.

Every algorithm that learns from rewards is the same few parts put together: an advantage, a loss, a
reduction, and terms that are added. A class holds the setting of its paper; every field can be set
over it, and a combination in which a field would do nothing is refused.
"""

import math
from typing import Annotated, ClassVar, Literal

from pydantic import ConfigDict, Field, model_validator

from rollflow.storage.config import Config

OUTCOMES = ("group", "group_mean", "leave_one_out", "return", "gae", "none")
GROUPED = ("group", "group_mean", "leave_one_out")
"""Advantages over the other samples of a group."""
LOSSES = ("clip", "sequence_clip", "cispo")


class CorrectionConfig(Config):
    """Importance weights for the gap between the rollout engine's policy and the trainer's.

    w = trainer's old policy / rollout policy. ``truncate`` multiplies the loss by w held within
    [low, high] (TIS, https://fengyao.notion.site/off-policy-rl); ``mask`` by w, and by 0 outside
    (IcePop, arXiv:2510.18855); ``reject`` leaves out every sample that has a w outside, and weighs
    nothing. What is left out still counts in the reduction's denominators.
    """

    level: Literal["token", "sequence", "geometric"] = "token"
    """w of each token; their product over the sample; or the product's root of the sample's length."""
    mode: Literal["truncate", "mask", "reject"] = "truncate"
    low: float = Field(default=0.0, ge=0)
    high: float = Field(default=2.0, gt=0)

    @model_validator(mode="after")
    def _bounds(self) -> "CorrectionConfig":
        if self.low >= self.high:
            raise ValueError(
                f"correction.low = {self.low:g} is not below correction.high = {self.high:g}"
            )
        if not self.low <= 1 <= self.high:
            raise ValueError(
                f"correction.low = {self.low:g} and correction.high = {self.high:g} leave out 1, "
                "the weight where both engines agree; make low at most 1 and high at least 1"
            )
        if self.mode != "truncate" and self.low == 0 and self.high == math.inf:
            raise ValueError(
                f"correction.mode = {self.mode!r} has no effect with low = 0 and high = inf; give a bound"
            )
        return self


class CriticConfig(Config):
    """The value model of PPO: the policy's architecture with a head of one output."""

    model_config = ConfigDict(allow_inf_nan=False)

    path: str = ""
    """Hugging Face folder its body starts from; empty for the policy's own. The head starts at 0."""
    lr: float = Field(default=1e-5, gt=0)
    lr_warmup_steps: int = Field(default=0, ge=0)
    warmup_steps: int = Field(default=0, ge=0)
    """First steps of the run in which only the critic learns."""
    value_clip: float = Field(default=0.2, gt=0)
    """How far a value may go from the old one before its loss stops to fall (arXiv:1707.06347)."""


class PolicyConfig(Config):
    """What the algorithms that learn from rewards have in common."""

    model_config = ConfigDict(allow_inf_nan=False)
    token_level: ClassVar[frozenset[str]] = frozenset({"return", "gae", "group_mean"})

    advantage: str = "group"
    """``group``: (R - mean of the group) / its std. ``group_mean``: R - mean. ``leave_one_out``: R -
    mean of the group's others. ``return``: discounted rewards to come. ``gae``: of a critic.
    ``none``: nothing of the reward, only the teacher. Or ``pkg.mod:fn`` of your own."""
    loss: str = "clip"
    """``clip`` (PPO's), ``sequence_clip`` (GSPO's), ``cispo``, or ``pkg.mod:fn`` of your own."""
    eps_clip: float = Field(default=0.2, gt=0, le=1)
    eps_clip_high: float = Field(default=0.2, gt=0)
    dual_clip: float | None = Field(default=None, gt=1)
    """Bound on the ratio where the advantage is negative (arXiv:1912.09729)."""
    reduction: Literal["token", "sequence", "episode", "constant"] = "token"
    """What counts alike: every token of the batch; every sample; every episode, whose samples share
    its tokens; or tokens / (samples x ``constant_tokens``)."""
    constant_tokens: int = Field(default=0, ge=0)
    """Divisor of the ``constant`` reduction; 0: ``rollout.sampling.max_new_tokens``."""
    whiten: bool = False
    """Shift and scale the advantages of a batch's tokens to mean 0 and variance 1."""
    gamma: float = Field(default=1.0, gt=0, le=1)
    lam: float = Field(default=1.0, ge=0, le=1)
    kl_coef: float = Field(default=0.0, ge=0)
    """Weight of the KL to the reference policy (the run's first weights)."""
    kl_type: Literal["k1", "k2", "k3", "low_var"] = "k3"
    kl_in: Literal["loss", "reward"] = "loss"
    kl_unbiased: bool = False
    """Weigh the KL in the loss by policy / old policy (DeepSeek-V3.2, arXiv:2512.02556)."""
    kl_watch: bool = False
    """Report the KL to the reference also where ``kl_coef`` is 0; costs a forward pass."""
    entropy_coef: float = Field(default=0.0, ge=0)
    correction: CorrectionConfig | None = None
    off_policy_delta: float | None = Field(default=None, gt=0)
    """Leave out tokens with a negative advantage in samples whose mean log(rollout / policy) is above
    this (arXiv:2512.02556)."""
    teacher_coef: float = Field(default=0.0, ge=0)
    """Weight of log(teacher / policy) of each sampled token in its advantage; needs ``rollout.teacher``."""
    critic: CriticConfig | None = None

    @model_validator(mode="after")
    def _combination(self) -> "PolicyConfig":
        self._known()
        self._advantage_fits()
        self._kl_has_an_effect()
        self._bounds_have_an_effect()
        if self.reduction != "constant" and self.constant_tokens:
            raise ValueError(
                f"constant_tokens has no effect with reduction = {self.reduction!r}; remove it"
            )
        return self

    def _bounds_have_an_effect(self) -> None:
        if self.loss not in ("clip", "sequence_clip") and self.dual_clip is not None:
            raise ValueError(f"dual_clip has no effect with loss = {self.loss!r}; remove it")
        for field in ("eps_clip", "eps_clip_high"):
            if ":" in self.loss and self._is_changed(field):
                raise ValueError(
                    f"{field} = {getattr(self, field):g} has no effect with loss = {self.loss!r}, which "
                    "has bounds of its own; remove it"
                )

    def _is_changed(self, field: str) -> bool:
        """Whether a field is other than this algorithm's default: a stored run names all of them."""
        return getattr(self, field) != type(self).model_fields[field].default

    def _known(self) -> None:
        for field, value, known in (
            ("advantage", self.advantage, OUTCOMES),
            ("loss", self.loss, LOSSES),
        ):
            if value not in known and ":" not in value:
                raise ValueError(
                    f"{field} = {value!r} is none of {', '.join(known)}; write one of them or "
                    "'pkg.mod:fn'"
                )

    def _advantage_fits(self) -> None:
        if self.gamma != 1 and self.advantage not in ("return", "gae"):
            raise ValueError(
                f"gamma = {self.gamma:g} has no effect with advantage = {self.advantage!r}; remove it"
            )
        if self.lam != 1 and self.advantage != "gae":
            raise ValueError(
                f"lam = {self.lam:g} has no effect with advantage = {self.advantage!r}; remove it"
            )
        if (self.critic is not None) != (self.advantage == "gae"):
            raise ValueError(
                f"advantage = {self.advantage!r} with{'' if self.critic else 'out'} a critic: "
                "'gae' needs one and nothing else uses it; use name = 'ppo' for it, another name for the rest"
            )
        if self.advantage == "none" and not self.teacher_coef:
            raise ValueError(
                "advantage = 'none' and teacher_coef = 0: there is nothing to learn from; raise "
                "teacher_coef or choose an advantage"
            )

    def _kl_has_an_effect(self) -> None:
        if self.kl_unbiased and (self.kl_in == "reward" or not self.kl_coef):
            raise ValueError(
                f"kl_unbiased has no effect with kl_in = {self.kl_in!r} and kl_coef = "
                f"{self.kl_coef:g}; it weighs a KL in the loss"
            )
        if self.kl_unbiased and self.kl_type == "k2":
            raise ValueError(
                "kl_unbiased = true with kl_type = 'k2', whose gradient is unbiased without it and is "
                "not with it; remove kl_unbiased, or use 'k3'"
            )
        if not self.kl_coef:
            self._nothing_is_said_of_a_kl()
            return
        if self.kl_in == "reward" and self.advantage not in self.token_level:
            raise ValueError(
                f"kl_coef = {self.kl_coef:g} with kl_in = 'reward' takes the KL from the rewards of single "
                f"tokens, which advantage = {self.advantage!r} has not; set kl_in = 'loss'"
            )
        if self.kl_in == "loss" and self.kl_type == "k1" and not self.kl_unbiased:
            raise ValueError(
                f"kl_coef = {self.kl_coef:g} has no effect with kl_type = 'k1' in the loss: its "
                "gradient is 0 in the mean. Use 'k2' or 'k3', or kl_unbiased = true"
            )

    def _nothing_is_said_of_a_kl(self) -> None:
        told = ("kl_in",) if self.kl_watch else ("kl_in", "kl_type")
        for field in told:
            if self._is_changed(field):
                raise ValueError(
                    f"{field} = {getattr(self, field)!r} has no effect with kl_coef = 0; raise kl_coef, or "
                    "remove it"
                )


class GrpoConfig(PolicyConfig):
    """Group relative policy optimisation (DeepSeekMath, arXiv:2402.03300).

    Its KL term is off here as in most later practice: the paper's is ``kl_coef = 0.04``.
    """

    name: Literal["grpo"] = "grpo"
    reduction: Literal["token", "sequence", "episode", "constant"] = "sequence"


class DrGrpoConfig(PolicyConfig):
    """GRPO done right (arXiv:2503.20783): no division by the std nor by the sample's length."""

    name: Literal["dr_grpo"] = "dr_grpo"
    advantage: str = "group_mean"
    reduction: Literal["token", "sequence", "episode", "constant"] = "constant"


class DapoConfig(PolicyConfig):
    """DAPO's loss (arXiv:2503.14476): clip-higher, every token alike, no KL."""

    name: Literal["dapo"] = "dapo"
    eps_clip_high: float = Field(default=0.28, gt=0)


class GspoConfig(PolicyConfig):
    """Group sequence policy optimisation (arXiv:2507.18071): one ratio for a whole sample."""

    name: Literal["gspo"] = "gspo"
    loss: str = "sequence_clip"
    eps_clip: float = Field(default=3e-4, gt=0, le=1)
    eps_clip_high: float = Field(default=4e-4, gt=0)
    reduction: Literal["token", "sequence", "episode", "constant"] = "sequence"


class CispoConfig(PolicyConfig):
    """Clipped importance-sampling weights (MiniMax-M1, arXiv:2506.13585): no token loses its gradient.

    The ratio has no lower bound and is held to 5, the bound of ScaleRL (arXiv:2510.13786).
    """

    name: Literal["cispo"] = "cispo"
    loss: str = "cispo"
    eps_clip: float = Field(default=1.0, gt=0, le=1)
    eps_clip_high: float = Field(default=4.0, gt=0)


class RlooConfig(PolicyConfig):
    """REINFORCE with a leave-one-out baseline (arXiv:2402.14740)."""

    name: Literal["rloo"] = "rloo"
    advantage: str = "leave_one_out"
    reduction: Literal["token", "sequence", "episode", "constant"] = "sequence"


class ReinforcePlusPlusConfig(PolicyConfig):
    """REINFORCE++ (arXiv:2501.03262): no group, KL in the reward, advantages whitened over the batch."""

    name: Literal["reinforce_pp"] = "reinforce_pp"
    advantage: str = "return"
    whiten: bool = True
    kl_coef: float = Field(default=1e-4, ge=0)
    kl_type: Literal["k1", "k2", "k3", "low_var"] = "k1"
    kl_in: Literal["loss", "reward"] = "reward"


class ReinforcePlusPlusBaselineConfig(PolicyConfig):
    """REINFORCE++-baseline (arXiv:2501.03262): R - mean of the group, whitened; KL k2 in the loss."""

    name: Literal["reinforce_pp_baseline"] = "reinforce_pp_baseline"
    advantage: str = "group_mean"
    whiten: bool = True
    kl_coef: float = Field(default=1e-5, ge=0)
    kl_type: Literal["k1", "k2", "k3", "low_var"] = "k2"


class PpoConfig(PolicyConfig):
    """Proximal policy optimisation with a critic (arXiv:1707.06347), as InstructGPT (arXiv:2203.02155)."""

    name: Literal["ppo"] = "ppo"
    advantage: str = "gae"
    lam: float = Field(default=0.95, ge=0, le=1)
    whiten: bool = True
    kl_coef: float = Field(default=0.02, ge=0)
    kl_type: Literal["k1", "k2", "k3", "low_var"] = "k1"
    kl_in: Literal["loss", "reward"] = "reward"
    critic: CriticConfig | None = CriticConfig()


class DistillConfig(PolicyConfig):
    """On-policy distillation (https://thinkingmachines.ai/blog/on-policy-distillation): the sampled
    reverse KL to a teacher is all there is to the advantage; rewards are only reported."""

    name: Literal["distill"] = "distill"
    advantage: str = "none"
    teacher_coef: float = Field(default=1.0, ge=0)


class SftConfig(Config):
    """Supervised fine-tuning: mean negative log-likelihood of the labels."""

    name: Literal["sft"] = "sft"
    reduction: Literal["token", "sequence", "episode"] = "token"


AlgorithmConfig = Annotated[
    GrpoConfig
    | DrGrpoConfig
    | DapoConfig
    | GspoConfig
    | CispoConfig
    | RlooConfig
    | ReinforcePlusPlusConfig
    | ReinforcePlusPlusBaselineConfig
    | PpoConfig
    | DistillConfig
    | SftConfig,
    Field(discriminator="name"),
]


OwnField = Literal["advantage", "loss"]


def own_function(config: AlgorithmConfig, field: OwnField) -> str:
    """``pkg.mod:fn`` of the user's that ``field`` names; empty where it names one of ours."""
    path = "" if isinstance(config, SftConfig) else str(getattr(config, field))
    return path if ":" in path else ""


def own_functions(config: AlgorithmConfig) -> dict[OwnField, str]:
    """``pkg.mod:fn`` of each of the user's own, by field."""
    fields: tuple[OwnField, ...] = ("advantage", "loss")
    return {field: path for field in fields if (path := own_function(config, field))}


def resolved(config: AlgorithmConfig, max_new_tokens: int) -> AlgorithmConfig:
    """The settings with what they take from the rollout: the divisor of a constant reduction."""
    if config.reduction != "constant" or config.constant_tokens:
        return config
    return config.model_copy(update={"constant_tokens": max_new_tokens})
