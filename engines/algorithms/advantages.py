"""How much better a sample is than the others of its group, from their rewards alone."""

from collections.abc import Hashable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .alike import ALIKE

_STD_EPSILON = 1e-6


def group_advantages(
    rewards_N: Tensor,
    groups_N: Sequence[Hashable],
    episodes_N: Sequence[Hashable] | None = None,
    *,
    normalize_std: bool = True,
) -> Tensor:
    """GRPO's outcome advantage (arXiv:2402.03300, section 4.1.2), one per sample.

    A_i = (R_i - mean of i's group) / (std of i's group + 1e-6), with the unbiased std; without the
    division it is Dr.GRPO's (arXiv:2503.20783). Groups are known by id, in any order and of any
    size. Samples of one episode count once in mean and std, by the mean of their rewards. A group
    whose episodes all have the same reward, and so one of a single episode, has exactly zero
    advantage, for its std would be 0. Computed in float64, returned as ``rewards_N`` came: [N], same
    dtype and device.

    Raises ValueError where the lengths differ or a reward is not finite.
    """
    groups = _Groups.of(rewards_N, groups_N, episodes_N)
    mean_G = groups.sum(groups.rewards_E) / groups.size_G
    advantages_N = rewards_N.double() - mean_G[groups.group_N]
    if normalize_std:
        centred_E = groups.rewards_E - mean_G[groups.group_E]
        variance_G = groups.sum(centred_E.square()) / (groups.size_G - 1).clamp(min=1)
        advantages_N = advantages_N / (variance_G.sqrt() + _STD_EPSILON)[groups.group_N]
    return advantages_N.masked_fill(groups.all_equal_N, 0.0).to(rewards_N.dtype)


def leave_one_out_advantages(
    rewards_N: Tensor, groups_N: Sequence[Hashable], episodes_N: Sequence[Hashable] | None = None
) -> Tensor:
    """RLOO's advantage (arXiv:2402.14740): R_i - mean of the *other* episodes of i's group.

    A group of one episode has no other and zero advantage. Otherwise as :func:`group_advantages`.
    """
    groups = _Groups.of(rewards_N, groups_N, episodes_N)
    others_E = groups.sum(groups.rewards_E)[groups.group_E] - groups.rewards_E
    others_E = others_E / (groups.size_G - 1).clamp(min=1)[groups.group_E]
    advantages_N = rewards_N.double() - others_E[groups.episode_N]
    return advantages_N.masked_fill(groups.all_equal_N, 0.0).to(rewards_N.dtype)


class _Groups(NamedTuple):
    """Samples N, their episodes E and groups G, by number."""

    episode_N: Tensor
    group_N: Tensor
    group_E: Tensor
    rewards_E: Tensor
    size_G: Tensor
    """Episodes of each group."""
    all_equal_N: Tensor
    """The episodes of the sample's group all have the same reward."""

    @classmethod
    def of(
        cls,
        rewards_N: Tensor,
        groups_N: Sequence[Hashable],
        episodes_N: Sequence[Hashable] | None,
    ) -> "_Groups":
        if rewards_N.shape != (len(groups_N),):
            raise ValueError(
                f"rewards_N has shape {tuple(rewards_N.shape)} for {len(groups_N)} group ids; "
                "give one reward and one group id per sample"
            )
        if not bool(torch.isfinite(rewards_N).all()):
            raise ValueError(
                "rewards_N has entries that are not finite; leave out samples without a reward"
            )
        device, rewards = rewards_N.device, rewards_N.double()
        group_N, groups = _numbered(groups_N, device)
        named = range(len(groups_N)) if episodes_N is None else episodes_N
        # An episode belongs to one group: the same name elsewhere is another episode.
        episode_N, episodes = _numbered(list(zip(groups_N, named, strict=True)), device)
        zeros_G, zeros_E = rewards.new_zeros(groups), rewards.new_zeros(episodes)
        siblings_E = zeros_E.index_add(0, episode_N, torch.ones_like(rewards))
        rewards_E = zeros_E.index_add(0, episode_N, rewards) / siblings_E
        group_E = group_N.new_zeros(episodes).index_copy(0, episode_N, group_N)
        highest_G = zeros_G.scatter_reduce(0, group_E, rewards_E, "amax", include_self=False)
        lowest_G = zeros_G.scatter_reduce(0, group_E, rewards_E, "amin", include_self=False)
        largest_G = torch.maximum(highest_G.abs(), lowest_G.abs())
        size_G = zeros_G.index_add(0, group_E, torch.ones_like(rewards_E))
        all_equal_N = (highest_G - lowest_G <= ALIKE * largest_G)[group_N]
        return cls(episode_N, group_N, group_E, rewards_E, size_G, all_equal_N)

    def sum(self, values_E: Tensor) -> Tensor:
        """Over each group's episodes, [G]."""
        return torch.zeros_like(self.size_G).index_add(0, self.group_E, values_E)


def _numbered(names: Sequence[Hashable], device: torch.device) -> tuple[Tensor, int]:
    number_of = {name: number for number, name in enumerate(dict.fromkeys(names))}
    numbers = torch.tensor([number_of[name] for name in names], dtype=torch.long)
    return numbers.to(device), len(number_of)
