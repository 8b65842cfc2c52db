"""What an algorithm is given of a batch, and what it gives."""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from .metrics import Metrics


@dataclass(frozen=True, slots=True)
class Outcomes:
    """The scored samples of a *whole batch*, as an advantage function of your own gets them."""

    rewards_N: Tensor
    """float64."""
    groups_N: Sequence[Hashable]
    episodes_N: Sequence[Hashable]


@dataclass(frozen=True, slots=True)
class AdvantageInputs:
    """Trained tokens of some whole samples, packed; float [T] but for ``segments_T``."""

    outcomes_T: Tensor
    """From ``compute_outcomes``, each sample's at each of its tokens."""
    segments_T: Tensor
    """Number of the sample that each token belongs to, long."""
    old_logprobs_T: Tensor | None = None
    ref_logprobs_T: Tensor | None = None
    values_T: Tensor | None = None
    teacher_logprobs_T: Tensor | None = None


class Advantages(NamedTuple):
    """``returns_T`` is what the critic learns; None without one."""

    advantages_T: Tensor
    returns_T: Tensor | None = None


@dataclass(frozen=True, slots=True)
class LossInputs:
    """The packed tokens of one micro-batch; every tensor is float [T] but for ``segments_T``.

    Tokens with weight 0 (prompts, tool output, padding) are looked at by nothing.
    """

    logprobs_T: Tensor
    """Of the policy in training, with gradient."""
    weights_T: Tensor
    """From ``reduction.sample_weights`` over the whole mini-batch."""
    entropy_T: Tensor | None = None
    """Of the policy in training; with gradient where ``entropy_coef`` is not 0."""
    advantages_T: Tensor | None = None
    old_logprobs_T: Tensor | None = None
    ref_logprobs_T: Tensor | None = None
    rollout_logprobs_T: Tensor | None = None
    """As the rollout engine sampled."""
    segments_T: Tensor | None = None
    """Number of the sample that each token belongs to, long."""


@dataclass(frozen=True, slots=True)
class ValueInputs:
    """The packed tokens of one micro-batch for the critic; every tensor is float [T]."""

    values_T: Tensor
    """Of the critic in training, with gradient."""
    old_values_T: Tensor
    returns_T: Tensor
    weights_T: Tensor


class LossOutputs(NamedTuple):
    """``loss`` is this micro-batch's share, to be summed; ``metrics`` are to be merged."""

    loss: Tensor
    metrics: Metrics


AdvantageFn = Callable[[Outcomes], Tensor]
"""An advantage of your own: one number for each sample, [N], in the order of the rewards."""
LossFn = Callable[[LossInputs], Tensor]
"""A loss of your own: one number for each token, [T], differentiable in ``inputs.logprobs_T``."""
