"""Numbers that are reduced over ranks in pieces come out as what practitioners watch."""

import pytest
import torch

from rollflow.engines.algorithms.diagnostics import advantage_metrics, derive, group_metrics
from rollflow.engines.algorithms.mismatch import mismatch_metrics


def test_groups_without_variance_are_told_apart_by_whether_they_were_ever_right():
    rewards = [0.0, 0.0, 1.0, 1.0, 0.0, 1.0, None, 2.0]
    groups = ["dead", "dead", "solved", "solved", "live", "live", "dead", "lone"]
    assert group_metrics(rewards, groups) == {
        "train/groups_zero_variance": 0.75,
        "train/prompts_dead": 0.25,
        "train/prompts_solved": 0.5,
    }
    assert group_metrics([None], ["a"]) == {}


def test_turns_of_one_episode_are_one_reward():
    found = group_metrics([0.0, 1.0, 1.0, 0.0, 1.0], ["a"] * 4 + ["b"], ["x", "x", "y", "y", "z"])
    assert found["train/groups_zero_variance"] == 1.0
    assert found["train/prompts_solved"] == 1.0


def test_advantages_are_told_apart_by_reward():
    found = advantage_metrics(torch.tensor([2.0, 1.0, -3.0]), torch.tensor([1.0, 1.0, 0.0]), 0.5)
    scalars = derive(found.values())
    assert scalars["train/advantage_mean"] == 0
    assert scalars["train/advantage_std"] == pytest.approx((14 / 3) ** 0.5)
    assert scalars["train/advantage_above_mean_reward"] == 1.5
    assert scalars["train/advantage_below_mean_reward"] == -3.0
    assert scalars["train/advantage_max"] == 3.0


def test_the_effective_sample_size_is_one_for_equal_weights_and_falls_with_their_spread():
    logprobs = torch.tensor([-1.0, -2.0])
    everywhere = torch.tensor([True, True])
    same = derive(mismatch_metrics(logprobs, logprobs, everywhere).values())
    assert same["mismatch/ess"] == 1.0
    weights = torch.tensor([3.0, 1.0])
    skewed = derive(mismatch_metrics(logprobs + weights.log(), logprobs, everywhere).values())
    assert skewed["mismatch/ess"] == pytest.approx(16 / 20)
    assert "mismatch/weight_sq" not in skewed


def test_the_smallest_ratio_and_the_explained_variance_come_from_what_is_reduced():
    found = derive(
        {
            "train/inverse_ratio_max": 4.0,
            "critic/return": 1.0,
            "critic/return_sq": 3.0,
            "critic/error": 0.5,
            "critic/error_sq": 0.75,
        }
    )
    assert found == {
        "train/ratio_min": 0.25,
        "critic/return": 1.0,
        "critic/explained_variance": 1 - 0.5 / 2.0,
    }
