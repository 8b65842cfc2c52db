import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rollflow.engines.algorithms.losses import clipped_policy_loss, nll_loss

tokens = st.lists(
    st.tuples(st.floats(-3, 0), st.floats(-3, 0), st.floats(-2, 2)), min_size=1, max_size=24
)


def reference(new, old, advantage, low, high):
    """(loss, its derivative in the new log-probability, whether it was clipped)."""
    ratio = math.exp(new - old)
    bounded = min(max(ratio, 1 - low), 1 + high)
    clipped = -bounded * advantage > -ratio * advantage
    slope = 0.0 if clipped else -ratio * advantage
    return max(-ratio * advantage, -bounded * advantage), slope, clipped


def column(rows, i):
    return torch.tensor([row[i] for row in rows], dtype=torch.float64)


@given(tokens, st.floats(0.05, 0.5), st.floats(0.05, 0.9))
def test_the_clipped_loss_equals_the_scalar_reference_in_value_and_gradient(rows, low, high):
    new = column(rows, 0).requires_grad_()
    got = clipped_policy_loss(
        new, column(rows, 1), column(rows, 2), eps_clip=low, eps_clip_high=high
    )
    got.loss_T.sum().backward()
    assert new.grad is not None
    losses, slopes, clipped = zip(*(reference(n, o, a, low, high) for n, o, a in rows), strict=True)
    assert got.loss_T.tolist() == pytest.approx(losses, abs=1e-12)
    assert new.grad.tolist() == pytest.approx(slopes, abs=1e-12)
    assert got.clipped_T.tolist() == list(clipped)
    assert got.log_ratio_T.tolist() == pytest.approx([n - o for n, o, _ in rows], abs=1e-12)


@pytest.mark.parametrize(
    ("ratio", "advantage", "slope"),
    [
        (1.30, 1.0, 0.0),  # a good token that already rose beyond the upper bound
        (1.25, 1.0, -1.25),  # within the upper bound, beyond the lower bound's mirror image
        (0.70, -1.0, 0.0),  # a bad token that already fell below the lower bound
        (0.70, 1.0, -0.7),  # a good token that fell is pulled back, however far it fell
        (1.50, -1.0, 1.5),  # a bad token that rose is pushed back, however far it rose
    ],
)
def test_only_a_token_that_moved_far_enough_the_right_way_stops(ratio, advantage, slope):
    new = torch.tensor([math.log(ratio)], dtype=torch.float64, requires_grad=True)
    got = clipped_policy_loss(
        new, torch.zeros(1), torch.tensor([advantage]), eps_clip=0.2, eps_clip_high=0.28
    )
    got.loss_T.sum().backward()
    assert new.grad is not None
    assert new.grad.item() == pytest.approx(slope)


def test_the_gradient_at_ratio_one_is_that_of_reinforce():
    new = torch.tensor([-1.0, -2.0], requires_grad=True)
    advantages = torch.tensor([0.5, -0.25])
    got = clipped_policy_loss(new, new.detach(), advantages, eps_clip=0.2, eps_clip_high=0.28)
    got.loss_T.sum().backward()
    assert new.grad is not None
    assert new.grad.tolist() == [-0.5, 0.25]
    assert got.log_ratio_T.tolist() == [0.0, 0.0]
    assert not got.clipped_T.any()


@pytest.mark.parametrize("advantage", [1.0, -1.0])
def test_a_token_far_off_gives_a_finite_loss_and_gradient(advantage):
    new = torch.tensor([0.0, -500.0], requires_grad=True)
    old = torch.tensor([-500.0, 0.0])
    got = clipped_policy_loss(
        new, old, torch.full((2,), advantage), eps_clip=0.2, eps_clip_high=0.28
    )
    got.loss_T.sum().backward()
    assert new.grad is not None
    assert bool(torch.isfinite(got.loss_T).all() and torch.isfinite(new.grad).all())


def test_no_gradient_flows_to_old_log_probabilities_or_advantages():
    new, old, advantages = (torch.zeros(3, requires_grad=True) for _ in range(3))
    got = clipped_policy_loss(new, old, advantages, eps_clip=0.2, eps_clip_high=0.28)
    got.loss_T.sum().backward()
    assert old.grad is None and advantages.grad is None


def test_the_supervised_loss_is_the_negative_log_likelihood():
    logprobs = torch.tensor([-0.5, -2.0], requires_grad=True)
    nll_loss(logprobs).sum().backward()
    assert nll_loss(logprobs).tolist() == [0.5, 2.0]
    assert logprobs.grad is not None
    assert logprobs.grad.tolist() == [-1.0, -1.0]
