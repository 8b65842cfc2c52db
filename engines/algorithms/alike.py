"""When the rewards of a group are equal, so that no sample is better than the others."""

import statistics
from collections.abc import Hashable, Iterable, Sequence

ALIKE = 1e-9
"""Rewards that are this close, relative to the largest, are equal: means of the same numbers may
differ in their last bits."""


def episode_rewards(samples: Iterable[tuple[Hashable, float]]) -> list[float]:
    """The reward of each episode, the mean of its samples', from (episode, reward) of one group."""
    episodes: dict[Hashable, list[float]] = {}
    for episode, reward in samples:
        episodes.setdefault(episode, []).append(reward)
    return [statistics.fmean(rewards) for rewards in episodes.values()]


def all_alike(rewards_E: Sequence[float]) -> bool:
    """Whether the episodes of one group have no advantage over each other."""
    return max(rewards_E) - min(rewards_E) <= ALIKE * max(map(abs, rewards_E))
