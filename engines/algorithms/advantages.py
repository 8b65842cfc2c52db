"""How much better a sample is than the others of its group."""

from collections.abc import Hashable, Sequence

import torch
from torch import Tensor

_STD_EPSILON = 1e-6


def group_advantages(
    rewards_N: Tensor, groups_N: Sequence[Hashable], *, normalize_std: bool = True
) -> Tensor:
    """GRPO's outcome advantage (arXiv:2402.03300, section 4.1.2), one per sample.

    A_i = (R_i - mean of i's group) / (std of i's group + 1e-6), with the unbiased std; without the
    division it is Dr.GRPO's (arXiv:2503.20783). Groups are known by id, in any order and of any
    size. A group whose rewards are all equal, and so one of a single sample, has exactly zero
    advantage. Computed in float64, returned as ``rewards_N`` came: [N], same dtype and device.

    Raises ValueError where the lengths differ or a reward is not finite.
    """
    if rewards_N.shape != (len(groups_N),):
        raise ValueError(
            f"rewards_N has shape {tuple(rewards_N.shape)} for {len(groups_N)} group ids; "
            "give one reward and one group id per sample"
        )
    if not bool(torch.isfinite(rewards_N).all()):
        raise ValueError(
            "rewards_N has entries that are not finite; leave out samples without a reward"
        )
    number_of = {group: number for number, group in enumerate(dict.fromkeys(groups_N))}
    group_N = torch.tensor([number_of[group] for group in groups_N], dtype=torch.long)
    group_N = group_N.to(rewards_N.device)
    rewards = rewards_N.double()
    zeros_G = rewards.new_zeros(len(number_of))

    size_G = zeros_G.index_add(0, group_N, torch.ones_like(rewards))
    mean_G = zeros_G.index_add(0, group_N, rewards) / size_G
    centred_N = rewards - mean_G[group_N]
    advantages_N = centred_N
    if normalize_std:
        variance_G = zeros_G.index_add(0, group_N, centred_N.square()) / (size_G - 1).clamp(min=1)
        advantages_N = centred_N / (variance_G.sqrt() + _STD_EPSILON)[group_N]

    highest_G = zeros_G.scatter_reduce(0, group_N, rewards, "amax", include_self=False)
    lowest_G = zeros_G.scatter_reduce(0, group_N, rewards, "amin", include_self=False)
    all_equal_G = highest_G == lowest_G
    return advantages_N.masked_fill(all_equal_G[group_N], 0.0).to(rewards_N.dtype)
