"""Numbers that must hold before an update, or the run stops and says what disagrees."""

from collections.abc import Mapping

from .config import GatesConfig

DEFAULTS = {
    "float32": {"logprob_gap_max": 1e-4, "logprob_gap_mean": None, "mismatch_kl": None},
    "bfloat16": {"logprob_gap_max": None, "logprob_gap_mean": 0.02, "mismatch_kl": 0.002},
}

WATCHED = {
    "logprob_gap_max": (
        "mismatch/logprob_gap_max",
        "largest |trainer - rollout| log-probability of a token",
    ),
    "logprob_gap_mean": (
        "mismatch/logprob_gap_mean",
        "mean |trainer - rollout| log-probability",
    ),
    "mismatch_kl": ("mismatch/kl", "estimated KL(rollout || trainer)"),
}


class GateError(RuntimeError):
    """A number that must hold does not; the message names it, its value and its limit."""


def check_mismatch(
    config: GatesConfig, dtype: str, metrics: Mapping[str, float], step: int
) -> None:
    """The trainer's log-probabilities agree with those the batch was sampled with.

    ``metrics`` are of the weights that sampled the batch, before its first update.

    Raises:
        GateError: they differ by more than the configured limit.
    """
    for field, (metric, words) in WATCHED.items():
        own = getattr(config, field)
        limit = DEFAULTS[dtype][field] if own is None else own
        found = metrics[metric]
        # Not `found > limit`: a NaN passes no gate.
        if limit is not None and not found <= limit:
            raise GateError(
                f"step {step}: {words} is {found:.3g}, above gates.{field} = {limit:g}; trainer "
                "and rollout servers do not compute the same policy (weights, tokens or sampling "
                "temperature differ)"
            )


def check_first_update(metrics: Mapping[str, float], step: int) -> None:
    """Before a batch's first update the policy is the old policy: every ratio is exactly 1.

    It compares two forward passes. Where old log-probabilities are those of the pass that trains
    (``trainer.old_logprobs = "auto"``, one update a batch) there is one, and nothing to find.

    Raises:
        GateError: a ratio is not 1, or the PPO-KL is not 0.
    """
    log_ratio, kl = metrics["train/log_ratio_max"], metrics["train/ppo_kl"]
    if not (log_ratio == 0 and kl == 0):
        raise GateError(
            f"step {step}: before the first update the largest |log ratio| is {log_ratio:.3g} and "
            f"the PPO-KL {kl:.3g}, both must be 0; two forward passes over the same weights "
            "and tokens differ (dropout, or a kernel that is not deterministic)"
        )


def check_gradient(grad_norm: float, step: int) -> None:
    """The gradient is a number.

    Raises:
        GateError: its norm is NaN or infinite; the weights were not touched.
    """
    if not grad_norm < float("inf"):
        raise GateError(
            f"step {step}: the gradient's norm is {grad_norm}; the update was not applied. Lower "
            "the learning rate or look at the batch"
        )
