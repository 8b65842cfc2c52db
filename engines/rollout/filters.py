"""Which finished groups become members of a batch: filters that come with rollflow, and users' own."""

from collections.abc import Callable, Sequence
from typing import Any

from rollflow.engines.algorithms.alike import all_alike, episode_rewards
from rollflow.engines.hooks import load_hook
from rollflow.storage.samples import Sample, Status

DynamicFilter = Callable[[Sequence[Sample]], str]
"""Why a scored group is not to be trained on; empty to keep it."""


def nonzero_std(samples: Sequence[Sample]) -> str:
    """Keep a group whose episodes' rewards differ, each the mean of its samples': equal ones have no
    advantage (DAPO, arXiv:2503.14476)."""
    scored = [(s.episode_id, s.reward) for s in samples if s.reward is not None]
    if not scored:
        return "no reward"
    rewards = episode_rewards(scored)
    return f"all rewards {rewards[0]:g}" if all_alike(rewards) else ""


def none_failed(samples: Sequence[Sample]) -> str:
    """Keep a group of which every sample was generated and scored."""
    return "a sample failed" if any(s.status is Status.FAILED for s in samples) else ""


def load_dynamic_filter(path: str) -> DynamicFilter:
    """The filter named ``pkg.mod:fn``; it may give a bool, a reason, or (keep, reason)."""
    function = load_hook(path, "dynamic_filter")

    def verdict(samples: Sequence[Sample]) -> str:
        return reason_of(function(list(samples)), path)

    return verdict


def reason_of(answer: Any, path: str) -> str:
    """What a filter said, as a reason to drop the group; empty where it is kept.

    TypeError where the filter gave neither a bool, a text, a pair nor an object with ``keep``.
    """
    if hasattr(answer, "keep"):  # slime's DynamicFilterOutput
        answer = (answer.keep, getattr(answer, "reason", None))
    if isinstance(answer, tuple) and len(answer) == 2:
        keep, reason = answer
        return "" if keep else str(reason or path.rpartition(":")[2])
    if isinstance(answer, bool):
        return "" if answer else path.rpartition(":")[2]
    if isinstance(answer, str):
        return answer
    raise TypeError(
        f"dynamic filter {path} gave {answer!r}; give True to keep the group, False or a reason"
    )
