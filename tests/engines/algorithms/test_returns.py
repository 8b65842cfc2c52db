"""Whitening is over the whole batch, however it is cut, and GAE looks at trained tokens alone."""

from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rollflow.engines.algorithms.returns import generalized_advantages, whiten
from rollflow.engines.algorithms.segments import discounted_sum, segment_mean
from tests.engines.algorithms import scalar

pieces = st.lists(st.lists(st.floats(-5, 5), min_size=1, max_size=6), min_size=1, max_size=6)


@given(pieces)
def test_whitening_equals_the_scalar_reference_however_the_batch_is_cut(samples):
    expected = [a for sample in scalar.whitened(samples) for a in sample]
    for cut in (samples, [[a for sample in samples for a in sample]]):
        tensors = [torch.tensor(piece, dtype=torch.float64) for piece in cut]
        got = whiten(tensors, [torch.ones(len(t)).bool() for t in tensors])
        assert torch.cat(got).tolist() == pytest.approx(expected, rel=1e-6, abs=1e-6)


@given(pieces)
def test_whitening_on_two_ranks_is_whitening_of_both_together(samples):
    tensors = [torch.tensor(sample, dtype=torch.float64) for sample in samples]
    kept = [torch.ones(len(t)).bool() for t in tensors]
    meeting, sums = Barrier(2), {}

    def of_rank(rank):
        def all_reduce(tensor, op):
            sums[rank] = tensor.clone()
            meeting.wait(10)
            tensor.copy_(sums[0] + sums[1])
            meeting.wait(10)

        return whiten(tensors[rank::2], kept[rank::2], all_reduce)

    with ThreadPoolExecutor(2) as threads:
        found = list(threads.map(of_rank, range(2)))
    together = whiten(tensors, kept)
    for rank in range(2):
        for got, expected in zip(found[rank], together[rank::2], strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-9)


def test_tokens_that_are_not_kept_move_nothing():
    values = torch.tensor([1.0, 1e9, 3.0])
    [got] = whiten([values], [torch.tensor([True, False, True])])
    assert got[1] == 0
    assert got[0] == -got[2] < 0


@given(pieces, st.floats(0, 1))
def test_a_discounted_sum_equals_the_loop(samples, discount):
    counts = torch.tensor([len(s) for s in samples])
    segments = torch.arange(len(samples)).repeat_interleave(counts)
    values = torch.tensor([v for s in samples for v in s], dtype=torch.float64)
    got = discounted_sum(values, segments, discount)
    expected = [a for s in samples for a in scalar.gae(s, [0.0] * len(s), discount, 1.0)]
    assert got.tolist() == pytest.approx(expected, rel=1e-9, abs=1e-9)


def test_a_long_sample_is_summed_to_its_end():
    n = 5000
    got = discounted_sum(torch.ones(n).double(), torch.zeros(n, dtype=torch.long), 1.0)
    assert got.tolist() == list(range(n, 0, -1))


def test_with_lambda_one_the_return_is_what_comes_and_the_value_only_the_baseline():
    rewards = torch.tensor([0.0, 0.0, 1.0, 5.0])
    values = torch.tensor([0.3, -0.2, 0.7, 2.0])
    segments = torch.tensor([0, 0, 0, 1])
    advantages, returns = generalized_advantages(rewards, values, segments, gamma=1.0, lam=1.0)
    assert returns.tolist() == pytest.approx([1.0, 1.0, 1.0, 5.0])
    assert (advantages + values).tolist() == pytest.approx(returns.tolist())


def test_a_mean_over_samples_skips_samples_that_were_left_out():
    got = segment_mean(torch.tensor([1.0, 3.0, 5.0]), torch.tensor([1, 1, 4]))
    assert got.tolist() == [2.0, 2.0, 5.0]
