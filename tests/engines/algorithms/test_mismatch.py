import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rollflow.engines.algorithms.mismatch import mismatch_metrics


@given(st.lists(st.tuples(st.floats(-5, 0), st.floats(-5, 0), st.booleans()), max_size=20))
def test_the_gap_and_the_kl_equal_the_scalar_reference(rows):
    trainer, rollout, mask = (torch.tensor([r[i] for r in rows]).double() for i in range(3))
    got = mismatch_metrics(trainer, rollout, mask.bool()).values()
    kept = [
        (t, r) for t, r, m in zip(*(x.tolist() for x in (trainer, rollout, mask)), strict=True) if m
    ]
    gaps = [abs(t - r) for t, r in kept] or [0.0]
    kls = [math.exp(t - r) - 1 - (t - r) for t, r in kept] or [0.0]
    assert got["mismatch/logprob_gap_max"] == pytest.approx(max(gaps), abs=1e-12)
    assert got["mismatch/logprob_gap_mean"] == pytest.approx(sum(gaps) / len(gaps), abs=1e-12)
    assert got["mismatch/kl"] == pytest.approx(sum(kls) / len(kls), abs=1e-12)


def test_what_stands_at_masked_tokens_does_not_matter():
    mask = torch.tensor([True, False])
    got = mismatch_metrics(torch.tensor([-1.0, torch.nan]), torch.tensor([-1.0, 0.0]), mask)
    weights = {"mismatch/weight", "mismatch/weight_sq"}
    assert {name: float(name in weights) for name in got.values()} == got.values()


def test_a_log_probability_that_is_not_a_number_shows_in_the_gap():
    got = mismatch_metrics(torch.tensor([torch.nan]), torch.zeros(1), torch.tensor([True]))
    assert math.isnan(got.values()["mismatch/logprob_gap_max"])
