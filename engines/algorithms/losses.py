"""Losses per token; ``reduction`` says how they are summed."""

from typing import NamedTuple

import torch
from torch import Tensor

_LOG_RATIO_LIMIT = 20.0


class PolicyLoss(NamedTuple):
    """A policy loss per token, and what to watch of it. Only ``loss_T`` carries a gradient."""

    loss_T: Tensor
    log_ratio_T: Tensor
    """log policy - log old policy, as it was before any clamp."""
    clipped_T: Tensor
    """True where the clipped branch was the larger: the token has no gradient."""


def clipped_policy_loss(
    logprobs_T: Tensor,
    old_logprobs_T: Tensor,
    advantages_T: Tensor,
    *,
    eps_clip: float,
    eps_clip_high: float,
) -> PolicyLoss:
    """PPO's clipped surrogate (arXiv:1707.06347) with DAPO's higher upper bound (arXiv:2503.14476).

    loss = max(-r A, -clip(r, 1 - eps_clip, 1 + eps_clip_high) A), r = exp(log policy - log old).
    All tensors [T]; the gradient flows to ``logprobs_T`` only. The log-ratio is clamped to +-20
    before the exponential, so that one far-off token cannot make the gradient NaN.
    """
    log_ratio_T = logprobs_T - old_logprobs_T.detach()
    ratio_T = log_ratio_T.clamp(-_LOG_RATIO_LIMIT, _LOG_RATIO_LIMIT).exp()
    advantages_T = advantages_T.detach()
    free_T = -ratio_T * advantages_T
    bound_T = -ratio_T.clamp(1 - eps_clip, 1 + eps_clip_high) * advantages_T
    return PolicyLoss(
        loss_T=torch.maximum(free_T, bound_T),
        log_ratio_T=log_ratio_T.detach(),
        clipped_T=(bound_T > free_T).detach(),
    )


def nll_loss(logprobs_T: Tensor) -> Tensor:
    """Supervised loss per token: the negative log-likelihood of the label, in nats, [T]."""
    return -logprobs_T
