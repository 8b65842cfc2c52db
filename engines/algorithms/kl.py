"""Estimators of the Kullback-Leibler divergence from log-probabilities of sampled tokens."""

from typing import Literal

from torch import Tensor

KlType = Literal["k1", "k2", "k3", "low_var"]

_LOG_RATIO_LIMIT = 20.0
_LOW_VAR_LIMIT = 10.0


def kl_estimate(logprobs_T: Tensor, ref_logprobs_T: Tensor, kind: KlType) -> Tensor:
    """KL(policy || reference) per token, [T], for tokens drawn from the policy.

    With l = log policy - log reference: k1 = l, k2 = l^2 / 2, k3 = exp(-l) - 1 + l
    (http://joschu.net/blog/kl-approx.html); low_var is k3 held to at most 10. k1 and k3 are
    unbiased, k3 never negative. As a *loss* prefer k2 or k3: the gradient of k1 has zero mean and
    pulls nowhere. In k3 l is clamped to +-20, beyond which the gradient is zero and not infinite.
    """
    log_ratio_T = logprobs_T - ref_logprobs_T
    match kind:
        case "k1":
            return log_ratio_T
        case "k2":
            return log_ratio_T.square() / 2
        case "k3":
            return _k3(log_ratio_T)
        case "low_var":
            return _k3(log_ratio_T).clamp(max=_LOW_VAR_LIMIT)


def _k3(log_ratio_T: Tensor) -> Tensor:
    limited_T = log_ratio_T.clamp(-_LOG_RATIO_LIMIT, _LOG_RATIO_LIMIT)
    return (-limited_T).expm1() + limited_T
