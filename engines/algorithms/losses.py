"""Losses per token; ``reduction`` says how they are summed."""

from typing import NamedTuple

import torch
from torch import Tensor

from .segments import segment_mean

_LOG_RATIO_LIMIT = 20.0


class PolicyLoss(NamedTuple):
    """A policy loss per token, and what to watch of it. Only ``loss_T`` carries a gradient."""

    loss_T: Tensor
    log_ratio_T: Tensor
    """log policy - log old policy of each token, as it was before any clamp."""
    clipped_T: Tensor
    """True where a bound decides: the token has no gradient (in CISPO: a smaller one)."""
    bounded_T: Tensor
    """The log-ratio that the bounds hold: the token's, or in GSPO its sample's."""


def clipped_policy_loss(
    logprobs_T: Tensor,
    old_logprobs_T: Tensor,
    advantages_T: Tensor,
    *,
    eps_clip: float,
    eps_clip_high: float,
    dual_clip: float | None = None,
    segments_T: Tensor | None = None,
) -> PolicyLoss:
    """PPO's clipped surrogate (arXiv:1707.06347) with DAPO's higher upper bound (arXiv:2503.14476).

    loss = max(-r A, -clip(r, 1 - eps_clip, 1 + eps_clip_high) A), r = exp(log policy - log old).
    With ``dual_clip`` c it is at most -c A where A is negative (arXiv:1912.09729). With
    ``segments_T`` r is one number per sample, exp(mean over its tokens of log policy - log old):
    GSPO's (arXiv:2507.18071). All tensors [T]; the gradient flows to ``logprobs_T`` only. The
    log-ratio is clamped to +-20 before the exponential, so that one far-off token cannot make the
    gradient NaN.
    """
    token_log_ratio_T = logprobs_T - old_logprobs_T.detach()
    log_ratio_T = token_log_ratio_T
    if segments_T is not None:
        log_ratio_T = segment_mean(token_log_ratio_T, segments_T)
    ratio_T = log_ratio_T.clamp(-_LOG_RATIO_LIMIT, _LOG_RATIO_LIMIT).exp()
    advantages_T = advantages_T.detach()
    free_T = -ratio_T * advantages_T
    bound_T = -ratio_T.clamp(1 - eps_clip, 1 + eps_clip_high) * advantages_T
    loss_T, clipped_T = torch.maximum(free_T, bound_T), bound_T > free_T
    if dual_clip is not None:
        ceiling_T = -dual_clip * advantages_T
        above_T = (advantages_T < 0) & (loss_T > ceiling_T)
        loss_T, clipped_T = torch.where(above_T, ceiling_T, loss_T), clipped_T | above_T
    return PolicyLoss(loss_T, token_log_ratio_T.detach(), clipped_T.detach(), log_ratio_T.detach())


def cispo_loss(
    logprobs_T: Tensor,
    old_logprobs_T: Tensor,
    advantages_T: Tensor,
    *,
    eps_clip: float,
    eps_clip_high: float,
) -> PolicyLoss:
    """CISPO (arXiv:2506.13585): -stop_gradient(clip(r, 1 - eps_clip, 1 + eps_clip_high)) A log policy.

    Bounds hold the weight of a token's gradient; none loses it. Shapes as in
    :func:`clipped_policy_loss`.
    """
    log_ratio_T = (logprobs_T - old_logprobs_T).detach()
    ratio_T = log_ratio_T.clamp(-_LOG_RATIO_LIMIT, _LOG_RATIO_LIMIT).exp()
    weight_T = ratio_T.clamp(1 - eps_clip, 1 + eps_clip_high)
    return PolicyLoss(
        loss_T=-weight_T * advantages_T.detach() * logprobs_T,
        log_ratio_T=log_ratio_T,
        clipped_T=weight_T != ratio_T,
        bounded_T=log_ratio_T,
    )


def value_loss(
    values_T: Tensor, old_values_T: Tensor, returns_T: Tensor, value_clip: float
) -> tuple[Tensor, Tensor]:
    """(PPO's clipped value loss, whether the bound decides), both [T] (arXiv:1707.06347).

    max((V - G)^2, (clip(V, V_old - value_clip, V_old + value_clip) - G)^2) / 2; the gradient flows
    to ``values_T`` only.
    """
    old_T, returns_T = old_values_T.detach(), returns_T.detach()
    near_T = old_T + (values_T - old_T).clamp(-value_clip, value_clip)
    free_T, bound_T = (values_T - returns_T).square(), (near_T - returns_T).square()
    return torch.maximum(free_T, bound_T) / 2, (bound_T > free_T).detach()


def nll_loss(logprobs_T: Tensor) -> Tensor:
    """Supervised loss per token: the negative log-likelihood of the label, in nats, [T]."""
    return -logprobs_T
