"""How far the trainer's log-probabilities are from those the rollout engine sampled with."""

from torch import Tensor

from .kl import kl_estimate
from .metrics import Metrics, max_of, mean_of


def mismatch_metrics(logprobs_T: Tensor, rollout_logprobs_T: Tensor, mask_T: Tensor) -> Metrics:
    """Gap between two engines that hold the same weights, over tokens where ``mask_T`` is True.

    ``mismatch/logprob_gap_max`` and ``_mean``: of |trainer - rollout| (nats). ``mismatch/kl``: the
    k3 estimate of KL(rollout || trainer), whose samples the tokens are. ``mismatch/weight``: the
    importance weight trainer / rollout, and its square; see ``diagnostics.derive``.
    """
    trainer_T, rollout_T = logprobs_T.detach()[mask_T].double(), rollout_logprobs_T[mask_T].double()
    gap_T = (trainer_T - rollout_T).abs()
    weight_T = (trainer_T - rollout_T).clamp(-20.0, 20.0).exp()
    return Metrics(
        means={
            "mismatch/logprob_gap_mean": mean_of(gap_T),
            "mismatch/kl": mean_of(kl_estimate(rollout_T, trainer_T, "k3")),
            "mismatch/weight": mean_of(weight_T),
            "mismatch/weight_sq": mean_of(weight_T.square()),
        },
        maxima={"mismatch/logprob_gap_max": max_of(gap_T)},
    )
