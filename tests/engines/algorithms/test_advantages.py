import random
import statistics

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rollflow.engines.algorithms.advantages import group_advantages, leave_one_out_advantages

rewards_and_groups = st.lists(
    st.tuples(
        st.one_of(st.sampled_from([0.0, 0.1, 0.3, 1.0]), st.floats(-100, 100, width=32)),
        st.sampled_from(["000001/a:1", "000001/a:2", "000001/b:1"]),
    ),
    max_size=24,
)


def reference(rewards, groups, normalize_std):
    advantages = []
    for reward, group in zip(rewards, groups, strict=True):
        others = [r for r, g in zip(rewards, groups, strict=True) if g == group]
        if len(set(others)) == 1:
            advantages.append(0.0)
            continue
        scale = statistics.stdev(others) + 1e-6 if normalize_std else 1.0
        advantages.append((reward - statistics.fmean(others)) / scale)
    return advantages


@given(rewards_and_groups, st.booleans())
def test_advantages_equal_the_scalar_reference_for_groups_of_any_size_and_order(rows, std):
    rewards, groups = [r for r, _ in rows], [g for _, g in rows]
    got = group_advantages(torch.tensor(rewards, dtype=torch.float64), groups, normalize_std=std)
    assert got.tolist() == pytest.approx(reference(rewards, groups, std), rel=1e-9, abs=1e-9)


@given(rewards_and_groups, st.integers(0, 99))
def test_the_order_of_the_samples_does_not_matter(rows, seed):
    order = list(range(len(rows)))
    random.Random(seed).shuffle(order)
    rewards = torch.tensor([r for r, _ in rows], dtype=torch.float64)
    there = group_advantages(rewards, [g for _, g in rows])
    shuffled = group_advantages(rewards[order], [rows[i][1] for i in order])
    torch.testing.assert_close(shuffled, there[order], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("std", [True, False])
@pytest.mark.parametrize("n", [1, 2, 3, 7])
def test_a_group_of_equal_rewards_has_exactly_zero_advantage(n, std):
    got = group_advantages(torch.full((n,), 0.1, dtype=torch.float64), ["g"] * n, normalize_std=std)
    assert got.tolist() == [0.0] * n


@pytest.mark.parametrize("std", [True, False])
@pytest.mark.parametrize(
    ("rewards", "episodes"),
    [
        ([0.0, 1.0, 0.0, 1.0], ["a", "a", "b", "b"]),
        ([0.1, 0.2, 0.15], ["a", "a", "b"]),  # the mean of the first two has another last bit
        ([0.0, 1.0], ["a", "a"]),
    ],
)
def test_turns_of_episodes_that_went_alike_have_no_advantage(rewards, episodes, std):
    rewards_N = torch.tensor(rewards, dtype=torch.float64)
    groups = ["g"] * len(rewards)
    for got in (
        group_advantages(rewards_N, groups, episodes, normalize_std=std),
        leave_one_out_advantages(rewards_N, groups, episodes),
    ):
        assert got.tolist() == [0.0] * len(rewards)


def test_a_right_answer_among_wrong_ones_stands_out():
    got = group_advantages(torch.tensor([1.0, 0.0, 0.0, 0.0]), ["g"] * 4)
    assert got.tolist() == pytest.approx([1.5, -0.5, -0.5, -0.5], rel=1e-5)
    assert got.dtype == torch.float32


def test_siblings_of_an_episode_count_once_by_the_mean_of_their_rewards():
    rewards, episodes = torch.tensor([1.0, 0.0, 0.0, 0.25]), ["a", "a", "b", "b"]
    mean = (0.5 + 0.125) / 2
    got = group_advantages(rewards, ["g"] * 4, episodes, normalize_std=False)
    assert got.tolist() == [1 - mean, -mean, -mean, 0.25 - mean]
    others = leave_one_out_advantages(rewards, ["g"] * 4, episodes)
    assert others.tolist() == [1 - 0.125, -0.125, -0.5, 0.25 - 0.5]


@pytest.mark.parametrize("advantages", [group_advantages, leave_one_out_advantages])
def test_an_episode_of_the_same_name_in_another_group_is_another_episode(advantages):
    rewards, groups = torch.tensor([1.0, 0.0, 1.0, 0.5]), ["g", "g", "h", "h"]
    same = advantages(rewards, groups, ["a", "b", "a", "b"])
    assert same.tolist() == advantages(rewards, groups, ["a", "b", "c", "d"]).tolist()


def test_an_episode_alone_in_its_group_has_no_other_to_be_compared_with():
    got = leave_one_out_advantages(torch.tensor([1.0, 0.0]), ["g", "g"], ["a", "a"])
    assert got.tolist() == [0.0, 0.0]


def test_a_group_id_too_few_is_refused():
    with pytest.raises(ValueError, match="one reward and one group id per sample"):
        group_advantages(torch.zeros(2), ["g"])


def test_a_reward_that_is_not_finite_is_refused():
    with pytest.raises(ValueError, match="not finite"):
        group_advantages(torch.tensor([0.0, torch.nan]), ["g", "g"])
