import math
import threading

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rollflow.engines.algorithms.logprobs import target_logprobs


def reference(logits, target, temperature):
    """(log-probability, entropy) of one token from a plain list of logits."""
    scaled = [x / temperature for x in logits]
    highest = max(scaled)
    normaliser = highest + math.log(sum(math.exp(x - highest) for x in scaled))
    entropy = -sum(math.exp(x - normaliser) * (x - normaliser) for x in scaled)
    return scaled[target] - normaliser, entropy


def by_log_softmax(logits, targets, temperature):
    log_p = torch.log_softmax(logits.double() / temperature, dim=-1)
    return log_p.gather(1, targets[:, None])[:, 0], -(log_p.exp() * log_p).sum(-1)


def random_case(seed, tokens, vocabulary):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(tokens, vocabulary, generator=generator) * 4
    targets = torch.randint(0, vocabulary, (tokens,), generator=generator)
    return logits, targets, torch.randn(2, tokens, generator=generator)


def gradient(logits, weights, function):
    leaf = logits.clone().requires_grad_()
    logprobs, entropy = function(leaf)
    (logprobs * weights[0] + entropy * weights[1]).sum().backward()
    assert leaf.grad is not None
    return leaf.grad


cases = st.tuples(st.integers(0, 10**6), st.integers(0, 12), st.integers(1, 17))
temperatures = st.sampled_from([0.3, 1.0, 1.7])


@given(cases, temperatures)
def test_values_equal_the_scalar_reference(case, temperature):
    logits, targets, _ = random_case(*case)
    logprobs, entropy = target_logprobs(logits, targets, temperature=temperature)
    rows = zip(logits.tolist(), targets.tolist(), strict=True)
    expected = [reference(row, target, temperature) for row, target in rows]
    assert logprobs.tolist() == pytest.approx([lp for lp, _ in expected], rel=1e-5, abs=1e-5)
    assert entropy.tolist() == pytest.approx([h for _, h in expected], rel=1e-5, abs=1e-5)


@given(cases, temperatures, st.integers(1, 64))
def test_the_gradient_equals_autograd_through_log_softmax_however_it_is_chunked(
    case, temperature, chunk_elements
):
    logits, targets, weights = random_case(*case)
    expected = gradient(logits, weights, lambda x: by_log_softmax(x, targets, temperature))
    got = gradient(
        logits,
        weights,
        lambda x: target_logprobs(
            x, targets, temperature=temperature, chunk_elements=chunk_elements
        ),
    )
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("size", [1.0, 4.0, 16.0])
def test_the_gradient_is_as_exact_as_float32_is_however_large_the_logits(size):
    logits, targets, weights = random_case(9, 200, 50)
    logits = size * (logits + 8)
    weights[1] = 0
    found = gradient(logits, weights, lambda x: target_logprobs(x, targets)).double()
    exact = gradient(logits.double(), weights, lambda x: by_log_softmax(x, targets, 1.0))
    assert (found - exact).norm() / exact.norm() < 2e-7


@pytest.mark.parametrize("which", [0, 1])
def test_each_result_alone_has_its_gradient(which):
    logits, targets, _ = random_case(3, 5, 7)
    leaf, plain = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    target_logprobs(leaf, targets)[which].sum().backward()
    by_log_softmax(plain, targets, 1.0)[which].sum().backward()
    torch.testing.assert_close(leaf.grad, plain.grad, rtol=1e-4, atol=1e-6)


def test_the_logits_are_left_as_they_were():
    logits, targets, _ = random_case(4, 5, 7)
    before = logits.clone()
    target_logprobs(logits, targets, vocab_size=4)
    assert torch.equal(logits, before)


def test_bfloat16_logits_are_reckoned_in_float32():
    logits, targets, weights = random_case(5, 6, 300)
    half = logits.bfloat16()
    got, entropy = target_logprobs(half, targets, temperature=0.7)
    expected, expected_entropy = by_log_softmax(half, targets, 0.7)
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(entropy.double(), expected_entropy, rtol=1e-5, atol=1e-5)
    assert gradient(half, weights, lambda x: target_logprobs(x, targets)).dtype == torch.bfloat16


def test_padding_columns_take_no_part_and_get_no_gradient():
    logits, targets, weights = random_case(6, 5, 8)
    padded = torch.cat([logits, torch.full((5, 3), 50.0)], dim=1)
    for got, expected in zip(
        target_logprobs(padded, targets, vocab_size=8),
        target_logprobs(logits, targets),
        strict=True,
    ):
        torch.testing.assert_close(got, expected)
    slope = gradient(padded, weights, lambda x: target_logprobs(x, targets, vocab_size=8))
    expected = gradient(logits, weights, lambda x: target_logprobs(x, targets))
    torch.testing.assert_close(slope[:, :8], expected)
    assert slope[:, 8:].eq(0).all()


def test_a_forbidden_token_counts_for_nothing():
    logits = torch.tensor([[1.0, -torch.inf, 2.0]])
    got = target_logprobs(logits, torch.tensor([0]))
    expected = target_logprobs(torch.tensor([[1.0, 2.0]]), torch.tensor([0]))
    torch.testing.assert_close(got, expected)
    slope = gradient(logits, torch.ones(2, 1), lambda x: target_logprobs(x, torch.tensor([0])))
    assert slope[0, 1] == 0 and torch.isfinite(slope).all()


def test_a_target_outside_the_vocabulary_is_not_a_number():
    logits, _, _ = random_case(7, 3, 5)
    logprobs, entropy = target_logprobs(logits, torch.tensor([-100, 4, 5]))
    assert torch.isnan(logprobs).tolist() == [True, False, True]
    assert torch.isfinite(entropy).all()


class Ranks:
    """All-reduce among threads of one process, each of which plays a rank."""

    def __init__(self, size):
        self.barrier = threading.Barrier(size, timeout=30)
        self.contributions = [torch.empty(0)] * size

    def all_reduce_of(self, rank):
        def all_reduce(tensor, operation):
            self.contributions[rank] = tensor.clone()
            self.barrier.wait()
            stacked = torch.stack(self.contributions)
            tensor.copy_(stacked.sum(0) if operation == "sum" else stacked.amax(0))
            self.barrier.wait()

        return all_reduce


@pytest.mark.parametrize("chunk_elements", [4, 2**20])
@pytest.mark.parametrize("vocab_size", [12, 9, 7])
def test_a_vocabulary_split_over_ranks_gives_the_same_values_and_gradients(
    vocab_size, chunk_elements
):
    logits, _, weights = random_case(8, 6, 12)
    targets = torch.tensor([0, 3, 4, 6, 5, 2])
    ranks, results = Ranks(3), {}

    def play(rank):
        leaf = logits[:, 4 * rank : 4 * rank + 4].clone().requires_grad_()
        logprobs, entropy = target_logprobs(
            leaf,
            targets,
            temperature=0.7,
            vocab_start=4 * rank,
            vocab_size=vocab_size,
            all_reduce=ranks.all_reduce_of(rank),
            chunk_elements=chunk_elements,
        )
        slope = torch.autograd.grad((logprobs * weights[0] + entropy * weights[1]).sum(), leaf)[0]
        results[rank] = (logprobs.detach(), entropy.detach(), slope)

    threads = [threading.Thread(target=play, args=(rank,)) for rank in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)

    whole = {"temperature": 0.7, "vocab_size": vocab_size}
    logprobs, entropy = target_logprobs(logits, targets, **whole)
    slope = gradient(logits, weights, lambda x: target_logprobs(x, targets, **whole))
    for rank in range(3):
        torch.testing.assert_close(results[rank][0], logprobs)
        torch.testing.assert_close(results[rank][1], entropy)
    torch.testing.assert_close(torch.cat([results[r][2] for r in range(3)], dim=1), slope)


def test_misshapen_arguments_are_refused_by_name():
    with pytest.raises(ValueError, match="targets_T"):
        target_logprobs(torch.zeros(3, 4), torch.zeros(2, dtype=torch.long))
    with pytest.raises(ValueError, match="temperature is 0"):
        target_logprobs(torch.zeros(3, 4), torch.zeros(3, dtype=torch.long), temperature=0.0)
