"""Numbers that tell how a training goes, beside those that the loss gives along the way."""

import math
from collections.abc import Hashable, Mapping, Sequence

from torch import Tensor

from .alike import all_alike, episode_rewards
from .metrics import Metrics, max_of, mean_of


def group_metrics(
    rewards_N: Sequence[float | None],
    groups_N: Sequence[Hashable],
    episodes_N: Sequence[Hashable] | None = None,
) -> dict[str, float]:
    """What the groups of a *whole batch* have to teach, from their rewards.

    ``train/groups_zero_variance``: share of groups whose episodes all have the same reward, the mean of
    their samples', which have no advantage. ``train/prompts_dead``: of those that never got more than
    0; ``train/prompts_solved``: the others of them. Groups without a reward are counted by none.
    """
    groups: dict[Hashable, list[tuple[Hashable, float]]] = {}
    named = range(len(groups_N)) if episodes_N is None else episodes_N
    for reward, group, episode in zip(rewards_N, groups_N, named, strict=True):
        if reward is not None:
            groups.setdefault(group, []).append((episode, reward))
    if not groups:
        return {}
    means = [episode_rewards(samples) for samples in groups.values()]
    flat = [max(rewards) for rewards in means if all_alike(rewards)]
    dead = sum(best <= 0 for best in flat)
    return {
        "train/groups_zero_variance": len(flat) / len(groups),
        "train/prompts_dead": dead / len(groups),
        "train/prompts_solved": (len(flat) - dead) / len(groups),
    }


def advantage_metrics(advantages_T: Tensor, rewards_T: Tensor, mean_reward: float) -> Metrics:
    """Advantages of trained tokens, and apart for samples above and not above the mean reward."""
    above_T = rewards_T > mean_reward
    return Metrics(
        means={
            "train/advantage_mean": mean_of(advantages_T),
            "train/advantage_sq": mean_of(advantages_T.double().square()),
            "train/advantage_above_mean_reward": mean_of(advantages_T[above_T]),
            "train/advantage_below_mean_reward": mean_of(advantages_T[~above_T]),
        },
        maxima={"train/advantage_max": max_of(advantages_T.abs())},
    )


def derive(scalars: Mapping[str, float]) -> dict[str, float]:
    """Turn sums of squares and inverses, which can be reduced over ranks, into what is watched.

    Effective sample sizes are (mean w)^2 / mean w^2, 1 where all weights are equal.
    """
    found = dict(scalars)
    for name, weight in (("train/ess", "train/ratio"), ("mismatch/ess", "mismatch/weight")):
        square = found.pop(f"{weight}_sq", None)
        mean = found.pop(weight, None) if weight == "mismatch/weight" else found.get(weight)
        if square is not None and mean is not None:
            found[name] = mean * mean / square if square else 0.0
    if (inverse := found.pop("train/inverse_ratio_max", None)) is not None:
        found["train/ratio_min"] = 1 / inverse if inverse else 0.0
    if (square := found.pop("train/advantage_sq", None)) is not None:
        found["train/advantage_std"] = math.sqrt(
            max(0.0, square - found["train/advantage_mean"] ** 2)
        )
    if (square := found.pop("critic/return_sq", None)) is not None:
        error = found.pop("critic/error_sq") - found.pop("critic/error") ** 2
        variance = square - found["critic/return"] ** 2
        found["critic/explained_variance"] = 1 - error / variance if variance > 1e-12 else 0.0
    return found
