import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rollflow.engines.algorithms.kl import kl_estimate

VALUE = {
    "k1": lambda x: x,
    "k2": lambda x: x * x / 2,
    "k3": lambda x: math.exp(-x) - 1 + x,
}
SLOPE = {
    "k1": lambda x: 1.0,
    "k2": lambda x: x,
    "k3": lambda x: 1 - math.exp(-x),
}


@pytest.mark.parametrize("kind", ["k1", "k2", "k3"])
@given(pairs=st.lists(st.tuples(st.floats(-9, 0), st.floats(-9, 0)), max_size=16))
def test_values_and_gradients_equal_the_scalar_reference(kind, pairs):
    policy = torch.tensor([p for p, _ in pairs], dtype=torch.float64, requires_grad=True)
    reference = torch.tensor([r for _, r in pairs], dtype=torch.float64)
    got = kl_estimate(policy, reference, kind)
    got.sum().backward()
    assert policy.grad is not None
    assert got.tolist() == pytest.approx([VALUE[kind](p - r) for p, r in pairs], abs=1e-12)
    assert policy.grad.tolist() == pytest.approx([SLOPE[kind](p - r) for p, r in pairs], abs=1e-12)


@pytest.mark.parametrize("kind", ["k1", "k3"])
def test_k1_and_k3_are_unbiased(kind):
    policy = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    reference = torch.tensor([0.2, 0.2, 0.6], dtype=torch.float64)
    expected = (policy * kl_estimate(policy.log(), reference.log(), kind)).sum()
    torch.testing.assert_close(expected, (policy * (policy / reference).log()).sum())


@given(st.floats(-30, 30), st.floats(-30, 30))
def test_k3_is_never_negative(policy, reference):
    pair = torch.tensor([policy, reference])
    assert kl_estimate(pair[:1], pair[1:], "k3").item() >= -1e-6


def test_the_low_variance_estimate_is_k3_held_to_ten():
    policy = torch.tensor([-9.0, -1.0], requires_grad=True)
    got = kl_estimate(policy, torch.tensor([-1.0, -1.5]), "low_var")
    got.sum().backward()
    assert got.tolist() == pytest.approx([10.0, math.exp(-0.5) - 0.5])
    assert policy.grad is not None
    assert policy.grad.tolist() == pytest.approx([0.0, 1 - math.exp(-0.5)])


def test_k3_of_a_token_far_off_is_finite_and_so_is_its_gradient():
    policy = torch.tensor([-200.0, -0.1], requires_grad=True)
    got = kl_estimate(policy, torch.tensor([-0.1, -200.0]), "k3")
    got.sum().backward()
    assert policy.grad is not None
    assert bool(torch.isfinite(got).all() and torch.isfinite(policy.grad).all())
