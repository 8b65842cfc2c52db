"""What counts as a regression, and which settings ask for it."""

import pytest

from rollflow.flows.arguments import build_config
from rollflow.flows.config import RegressionConfig
from rollflow.flows.judging import regression

from .least import BASE

REWARD = "eval/heldout/reward"
GATE = RegressionConfig(metric=REWARD, tolerance=0.05)
EVALS = [{"name": "heldout", "data": {"path": "heldout.jsonl"}}]


def evaluations(**rewards):
    return {int(v[1:]): {REWARD: r} for v, r in rewards.items()}


def found_in(gate, metrics, version):
    """The regression that there has to be."""
    found = regression(gate, metrics, version)
    assert found is not None
    return found


def test_worse_than_the_best_before_it_by_more_than_the_tolerance_is_a_regression():
    found = found_in(GATE, evaluations(v10=0.5, v20=0.8, v30=0.7), 30)
    assert (found.best_version, found.best, found.value) == (20, 0.8, 0.7)
    assert regression(GATE, evaluations(v10=0.5, v20=0.8, v30=0.76), 30) is None


def test_a_late_evaluation_is_not_compared_with_weights_that_were_trained_longer():
    late = evaluations(v10=0.5, v20=0.4, v30=0.9)
    assert found_in(GATE, late, 20).best_version == 10
    assert regression(GATE, evaluations(v20=0.4, v30=0.9), 20) is None


def test_the_first_weights_are_no_checkpoint_to_go_back_to():
    assert regression(GATE, evaluations(v0=0.9, v10=0.5), 10) is None


def test_of_a_loss_more_is_worse():
    gate = RegressionConfig(metric=REWARD, tolerance=0.05, lower_is_better=True)
    assert found_in(gate, evaluations(v10=0.5, v20=0.6), 20).best == 0.5
    assert regression(gate, evaluations(v10=0.5, v20=0.3), 20) is None


def test_a_metric_that_was_not_measured_says_nothing():
    assert regression(GATE, {10: {REWARD: 0.5}, 20: {"eval/other/reward": 0.1}}, 20) is None


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"checkpoint": {"evaluate": True}}, "checkpoint.evaluate"),
        ({"checkpoint": {"evaluate": True, "hf": False}, "evals": EVALS}, "hf = true"),
        (
            {"regression": {"metric": REWARD, "tolerance": 0.1}, "evals": EVALS},
            "checkpoint.evaluate = false",
        ),
        (
            {
                "checkpoint": {"evaluate": True},
                "regression": {"metric": "eval/x/reward", "tolerance": 0.1},
                "evals": EVALS,
            },
            "regression.metric",
        ),
    ],
)
def test_settings_that_would_judge_nothing_are_refused_by_name(changes, field):
    with pytest.raises(ValueError, match=field):
        build_config({**BASE, **changes})
