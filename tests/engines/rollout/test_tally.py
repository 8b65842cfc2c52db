"""``avg@n`` and ``pass@k``: against the closed formula, and against drawing every subset."""

import math
import statistics
from itertools import combinations

import pytest

from rollflow.engines.rollout.tally import pass_at, pass_metrics


@pytest.mark.parametrize("n", range(1, 9))
def test_pass_at_k_is_the_closed_formula_and_the_mean_over_all_subsets(n: int):
    for right in range(n + 1):
        samples = [1] * right + [0] * (n - right)
        for k in range(1, n + 1):
            closed = 1 - math.comb(n - right, k) / math.comb(n, k)
            drawn = statistics.fmean(max(subset) for subset in combinations(samples, k))
            assert pass_at(k, n, right) == pytest.approx(closed, abs=1e-15)
            assert pass_at(k, n, right) == pytest.approx(drawn, abs=1e-12)


def test_each_power_of_two_up_to_n_and_n_itself_is_a_k():
    found = pass_metrics("eval/a", [[1.0, 0.0, 0.0, 0.0, 0.0, 0.0]] * 2, 1.0)
    assert found == {
        "eval/a/pass@1": pytest.approx(1 / 6),
        "eval/a/pass@2": pytest.approx(1 / 3),
        "eval/a/pass@4": pytest.approx(2 / 3),
        "eval/a/pass@6": 1.0,
        "eval/a/avg@6": pytest.approx(1 / 6),
    }


def test_a_failed_sample_is_not_right_in_pass_at_k_and_no_reward_in_avg():
    found = pass_metrics("e", [[1.0, None, 0.0, None], [None, None, None, None]], 1.0)
    assert found["e/pass@1"] == pytest.approx((1 - 3 / 4 + 0) / 2)
    assert found["e/pass@2"] == pytest.approx((1 - math.comb(3, 2) / math.comb(4, 2) + 0) / 2)
    assert found["e/pass@4"] == pytest.approx((1 + 0) / 2)
    assert found["e/avg@4"] == 0.5  # of the two scored samples; the other prompt has none


def test_each_prompt_weighs_the_same_whatever_it_has_of_scored_samples():
    found = pass_metrics("e", [[1.0, None, None, None], [0.0, 0.0, 0.0, 1.0]], 1.0)
    assert found["e/avg@4"] == pytest.approx((1.0 + 0.25) / 2)


def test_what_counts_as_solved_is_a_setting():
    rewards = [[0.4, 0.5, 0.6, 0.0]]
    assert pass_metrics("e", rewards, 0.5)["e/pass@1"] == 0.5
    assert pass_metrics("e", rewards, 0.6)["e/pass@1"] == 0.25


def test_groups_of_several_sizes_have_the_ks_of_the_smallest():
    found = pass_metrics("e", [[1.0, 0.0], [0.0, 0.0, 1.0]], 1.0)
    assert found["e/pass@1"] == pytest.approx((1 / 2 + 1 / 3) / 2)
    assert found["e/pass@2"] == pytest.approx((1 + (1 - math.comb(2, 2) / math.comb(3, 2))) / 2)
    assert set(found) == {"e/pass@1", "e/pass@2", "e/avg@2"}


@pytest.mark.parametrize("rewards", [[], [[1.0], [0.0]]])
def test_one_sample_a_prompt_has_neither(rewards: list[list[float | None]]):
    assert pass_metrics("e", rewards, 1.0) == {}
