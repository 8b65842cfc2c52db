"""Counts what a batch holds while it is collected, and turns the counts into metrics."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field

from rollflow.storage.samples import Sample, Status


@dataclass(slots=True)
class Tally:
    """Sums over samples; add whole groups."""

    groups: int = 0
    samples: int = 0
    tokens: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    truncated: int = 0
    failed: int = 0
    equal_groups: int = 0
    """Groups whose scored samples all have one reward: nothing to learn from."""
    rewards: list[float] = field(default_factory=list[float])
    parts: dict[str, list[float]] = field(default_factory=dict[str, list[float]])
    """Values of each named part of the rewards, of the samples that have it."""
    versions: set[int] = field(default_factory=set[int])

    def add(self, group: Sequence[Sample]) -> None:
        """Count a group."""
        rewards = [s.reward for s in group if s.reward is not None]
        self.groups += 1
        self.equal_groups += len(set(rewards)) <= 1
        self.rewards += rewards
        for sample in group:
            self.samples += 1
            self.tokens += len(sample.response_ids)
            self.prompt_tokens += len(sample.prompt_ids)
            self.cached_tokens += sample.cached_tokens
            self.truncated += sample.status is Status.TRUNCATED
            self.failed += sample.status is Status.FAILED
            self.versions.update(sample.policy_versions)
            for name, value in sample.reward_parts.items():
                self.parts.setdefault(name, []).append(value)

    def metrics(self, prefix: str) -> dict[str, float]:
        """Scalars under ``prefix``, e.g. ``rollout/reward``; rewards are absent where none is.

        ``rollout/reward_parts/format`` is the mean of that part over the samples that have it.
        """
        samples = max(self.samples, 1)
        found = {
            "response_len": self.tokens / samples,
            "truncated_ratio": self.truncated / samples,
            "failed": float(self.failed),
            "zero_std_groups": self.equal_groups / max(self.groups, 1),
            "prefix_cache_hit": self.cached_tokens / max(self.prompt_tokens, 1),
        }
        if self.rewards:
            found["reward"] = statistics.fmean(self.rewards)
            found["reward_std"] = statistics.pstdev(self.rewards)
        for name, values in self.parts.items():
            found[f"reward_parts/{name}"] = statistics.fmean(values)
        return {f"{prefix}/{name}": value for name, value in found.items()}


def pass_metrics(
    prefix: str, rewards_GN: Sequence[Sequence[float | None]], solved_at: float
) -> dict[str, float]:
    """``avg@n`` and ``pass@k`` of an evaluation with n samples for each prompt; {} where n is 1.

    ``pass@k`` is the unbiased estimate 1 - C(n-c, k)/C(n, k) of the chance that one of k samples is
    right, where c of n were (arXiv:2107.03374); for k = 1, 2, 4, ... up to n, the mean over prompts.
    A sample without reward is not right. n is the smallest group's.
    """
    n = min((len(rewards_N) for rewards_N in rewards_GN), default=0)
    if n <= 1:
        return {}
    solved = [(len(r), sum(x is not None and x >= solved_at for x in r)) for r in rewards_GN]
    ks = sorted({*(2**i for i in range(n.bit_length()) if 2**i <= n), n})
    found = {
        f"{prefix}/pass@{k}": statistics.fmean(pass_at(k, of, right) for of, right in solved)
        for k in ks
    }
    means = [statistics.fmean(x for x in r if x is not None) for r in rewards_GN if any(
        x is not None for x in r)]  # fmt: skip
    if means:
        found[f"{prefix}/avg@{n}"] = statistics.fmean(means)
    return found


def pass_at(k: int, n: int, right: int) -> float:
    """Chance that k of n samples, drawn without return, hold one of the ``right`` ones.

    >>> pass_at(1, 4, 1), pass_at(4, 4, 1), pass_at(2, 4, 0)
    (0.25, 1.0, 0.0)
    """
    return 1.0 - math.comb(n - right, k) / math.comb(n, k)
