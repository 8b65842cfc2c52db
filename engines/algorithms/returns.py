"""Advantages token by token: what is to come after a token, by rewards, penalties and values.

Only trained tokens are here: a tool's tokens between two of the policy's own neither take a reward
nor a value, and the discount counts the policy's own tokens alone.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from .metrics import AllReduce
from .segments import discounted_sum, following, is_last

_VARIANCE_EPSILON = 1e-8


def token_rewards(rewards_T: Tensor, penalties_T: Tensor | None, segments_T: Tensor) -> Tensor:
    """The sample's reward at its last token, less a penalty at every token, [T].

    ``rewards_T`` has the sample's reward at each of its tokens.
    """
    last_T = is_last(segments_T)
    rewards_T = rewards_T.masked_fill(~last_T, 0.0)
    return rewards_T if penalties_T is None else rewards_T - penalties_T


def generalized_advantages(
    token_rewards_T: Tensor, values_T: Tensor, segments_T: Tensor, *, gamma: float, lam: float
) -> tuple[Tensor, Tensor]:
    """(advantages, returns) of GAE (arXiv:1506.02438), both [T].

    d_t = r_t + gamma V_{t+1} - V_t with V = 0 after the sample's last token; A_t is the sum of
    (gamma lam)^(s - t) d_s over the tokens from t on, and the return A_t + V_t.
    """
    deltas_T = token_rewards_T + gamma * following(values_T, segments_T) - values_T
    advantages_T = discounted_sum(deltas_T, segments_T, gamma * lam)
    return advantages_T, advantages_T + values_T


def whiten(
    advantages: Sequence[Tensor], kept: Sequence[Tensor], all_reduce: AllReduce | None = None
) -> list[Tensor]:
    """(A - mean) / sqrt(variance + 1e-8), over the kept tokens of all pieces on all ranks.

    ``kept`` has a bool tensor for each piece; other tokens become 0. The variance is the unbiased
    one. ``all_reduce`` reduces a tensor in place over the ranks that hold pieces.
    """
    zero = torch.zeros(2, dtype=torch.float64, device=advantages[0].device if advantages else None)

    def total(pieces: Sequence[Tensor]) -> Tensor:
        sums = zero + sum(
            (torch.stack([p.sum(), p.new_tensor(float(len(p)))]) for p in pieces), start=zero
        )
        if all_reduce:
            all_reduce(sums, "sum")
        return sums

    own = [a.double()[k] for a, k in zip(advantages, kept, strict=True)]
    first = total(own)
    mean = first[0] / first[1].clamp(min=1)
    second = total([(a - mean).square() for a in own])
    scale = (second[0] / (second[1] - 1).clamp(min=1) + _VARIANCE_EPSILON).sqrt()
    return [
        ((a.double() - mean) / scale).masked_fill(~k, 0.0).to(a.dtype)
        for a, k in zip(advantages, kept, strict=True)
    ]
