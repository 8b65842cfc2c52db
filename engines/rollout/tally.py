"""Counts what a batch holds while it is collected, and turns the counts into metrics."""

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

    def metrics(self, prefix: str) -> dict[str, float]:
        """Scalars under ``prefix``, e.g. ``rollout/reward``; rewards are absent where none is."""
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
        return {f"{prefix}/{name}": value for name, value in found.items()}
