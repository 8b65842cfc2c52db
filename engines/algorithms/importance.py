"""What is left of a token's loss when the policy that sampled it is not quite the policy in training."""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from .segments import segment_mean, segment_sum

_LOG_RATIO_LIMIT = 20.0

Level = Literal["token", "sequence", "geometric"]
Mode = Literal["truncate", "mask", "reject"]


class Correction(NamedTuple):
    """Factors of the loss per token, without a gradient."""

    factor_T: Tensor
    weight_T: Tensor
    """Trainer's old policy / rollout policy at the level asked for, before any bound."""
    outside_T: Tensor
    """True where the weight is out of bounds."""


def correction(
    old_logprobs_T: Tensor,
    rollout_logprobs_T: Tensor,
    segments_T: Tensor,
    *,
    level: Level,
    mode: Mode,
    low: float,
    high: float,
) -> Correction:
    """Importance weights between the rollout engine and the trainer; see ``CorrectionConfig``.

    With l = log old - log rollout per token: ``token`` exp(l), ``sequence`` exp(sum of l over the
    sample), ``geometric`` exp(mean of l). All tensors [T]. The exponent is clamped to +-20.
    """
    log_ratio_T = old_logprobs_T.detach() - rollout_logprobs_T.detach()
    match level:
        case "token":
            log_weight_T = log_ratio_T
        case "sequence":
            log_weight_T = segment_sum(log_ratio_T, segments_T)
        case "geometric":
            log_weight_T = segment_mean(log_ratio_T, segments_T)
    weight_T = log_weight_T.clamp(-_LOG_RATIO_LIMIT, _LOG_RATIO_LIMIT).exp()
    outside_T = (weight_T < low) | (weight_T > high)
    match mode:
        case "truncate":
            factor_T = weight_T.clamp(low, high)
        case "mask":
            factor_T = weight_T.masked_fill(outside_T, 0.0)
        case "reject":
            rejected_T = segment_sum(outside_T.to(weight_T.dtype), segments_T) > 0
            factor_T = torch.ones_like(weight_T).masked_fill(rejected_T, 0.0)
    return Correction(factor_T, weight_T, outside_T)


def too_far_off(
    logprobs_T: Tensor,
    rollout_logprobs_T: Tensor,
    advantages_T: Tensor,
    segments_T: Tensor,
    delta: float,
) -> Tensor:
    """Tokens to leave out: a negative advantage in a sample that the policy has moved away from.

    Where the sample's mean of log rollout - log policy is above ``delta``; bool [T]
    (off-policy sequence masking, arXiv:2512.02556). The rollout's own log-probabilities are taken,
    so updates since and a gap between the engines both count.
    """
    distance_T = segment_mean(rollout_logprobs_T.detach() - logprobs_T.detach(), segments_T)
    return (advantages_T < 0) & (distance_T > delta)
