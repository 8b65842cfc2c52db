"""Kernels of ours compute what plain PyTorch does, and draw from the distribution that they say.

Without a GPU they run in Triton's interpreter, where Triton is installed, in five minutes:
``TRITON_INTERPRET=1 pytest tests/gpu/test_kernels.py -W ignore::RuntimeWarning``.
"""

import importlib.util
import os

import pytest
import torch

from rollflow.engines.algorithms.logprobs import target_logprobs

INTERPRETED = (
    os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton") is not None
)
DEVICE = "cpu" if INTERPRETED else "cuda"
ROWS = 1 << (10 if INTERPRETED else 18)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not (INTERPRETED or torch.cuda.is_available()), reason="torch sees no GPU"),
]


@pytest.mark.parametrize("with_entropy", [True, False])
@pytest.mark.parametrize(
    ("tokens", "vocabulary", "columns", "temperature"),
    [(1, 1, 1, 1.0), (7, 33, 33, 1.0), (9, 4097, 4000, 0.7), (3, 151936, 151936, 1.3)],
)
def test_logprobs_and_gradients_of_the_kernels_are_those_of_float64(
    tokens, vocabulary, columns, temperature, with_entropy
):
    from rollflow.engines.gpu import logprob_kernels

    torch.manual_seed(0)
    logits = torch.randn(tokens, vocabulary) * 4
    targets = torch.randint(0, columns, (tokens,))
    on_logprobs, on_entropy = torch.randn(2, tokens)
    exact = logits.double().requires_grad_()
    log_p = (exact[:, :columns] / temperature).log_softmax(-1)
    logprobs, entropy = log_p.gather(1, targets[:, None])[:, 0], -(log_p.exp() * log_p).sum(-1)
    loss = (logprobs * on_logprobs.double()).sum()
    if with_entropy:
        loss = loss + (entropy * on_entropy.double()).sum()
    loss.backward()

    logits, targets = logits.to(DEVICE), targets.to(DEVICE)
    found = logprob_kernels.forward(logits, targets, columns, temperature)
    gradient = logprob_kernels.backward(
        logits,
        targets,
        (found[2], found[3], found[1]),
        on_logprobs.to(DEVICE),
        on_entropy.to(DEVICE) if with_entropy else None,
        columns,
        temperature,
    )
    assert exact.grad is not None
    for expected, result in (
        (logprobs.detach(), found[0]),
        (entropy.detach(), found[1]),
        (exact.grad, gradient),
    ):
        apart = (result.cpu().double() - expected).norm()
        assert apart <= 1e-5 * expected.norm() + 1e-6


def test_a_target_outside_the_vocabulary_has_no_logprob():
    from rollflow.engines.gpu import logprob_kernels

    targets = torch.tensor([0, 8, -1], device=DEVICE)
    logprobs = logprob_kernels.forward(torch.zeros(3, 8, device=DEVICE), targets, 8, 1.0)[0]
    assert logprobs.isnan().tolist() == [False, True, True]


@pytest.mark.skipif(INTERPRETED, reason="only tensors on a GPU are given to the kernels")
def test_a_gpu_s_logprobs_take_the_kernels_and_equal_the_cpu_s():
    torch.manual_seed(0)
    logits, targets = torch.randn(40, 5000) * 4, torch.randint(0, 5000, (40,))
    expected, found = (
        target_logprobs(logits, targets),
        target_logprobs(logits.cuda(), targets.cuda()),
    )
    for a, b in zip(expected, found, strict=True):
        assert (a - b.cpu()).abs().max() < 1e-5


def test_draws_have_the_distribution_and_the_logprob_of_the_softmax():
    from rollflow.engines.gpu.sampling_kernel import draw

    torch.manual_seed(0)
    columns, temperature = 37, 0.8
    logits = torch.randn(columns, device=DEVICE) * 3
    expected = (logits.double() / temperature).log_softmax(-1)
    tokens, logprobs = draw(
        logits.expand(ROWS, -1), torch.full((ROWS, 1), temperature, device=DEVICE)
    )
    assert (logprobs - expected[tokens.long()]).abs().max() < 1e-5
    counts = torch.bincount(tokens.long(), minlength=columns).double()
    wanted = expected.exp() * ROWS
    often = wanted > 5
    chi_square = ((counts - wanted).square() / wanted)[often].sum()
    assert chi_square < 90  # at most 36 degrees of freedom: exceeded once in 10^6


def test_draws_over_a_large_vocabulary_reach_all_of_it_and_differ_by_row_and_call():
    from rollflow.engines.gpu.sampling_kernel import draw

    rows, calls = (8, 4) if INTERPRETED else (512, 64)
    logits = torch.zeros(rows, 151936, device=DEVICE, dtype=torch.bfloat16)
    ones = torch.ones(rows, 1, device=DEVICE)
    drawn = torch.stack([draw(logits, ones)[0] for _ in range(calls)]).flatten().double()
    spread = 5 * (rows * calls) ** -0.5
    assert drawn.unique().numel() > 0.85 * len(drawn)
    assert abs(float(drawn.mean()) / 151935 - 0.5) < spread * 12**-0.5
    assert abs(float(drawn.std()) / 151935 - 12**-0.5) < spread * 12**-0.5


@pytest.mark.parametrize("width", [None, 96])
@pytest.mark.parametrize(("heads", "groups", "size"), [(16, 8, 128), (4, 1, 16)])
@pytest.mark.parametrize(("kind", "apart"), [(torch.float32, 1e-5), (torch.bfloat16, 5e-3)])
def test_heads_are_normalised_and_rotated_and_fill_the_cache(
    heads, groups, size, kind, apart, width
):
    from rollflow.engines.gpu.heads_kernel import queries_of

    if INTERPRETED and kind is torch.bfloat16:
        pytest.skip("the interpreter cuts bits off where a GPU rounds")
    torch.manual_seed(0)
    tokens, slots, length = 5, 40, 20
    qkv = torch.randn(tokens, (heads + 2 * groups) * size).to(kind)
    weights = [torch.rand(size).to(kind) + 0.5 for _ in range(2)]
    angles = torch.outer(torch.arange(length), 1e4 ** -(torch.arange(size // 2) / (size // 2)))
    cos, sin = angles.cos(), angles.sin()
    positions, places = torch.randint(length, (tokens,)), torch.randperm(slots)[:tokens]

    def rotated(x, weight):
        x = x.float() * (x.float().square().mean(-1, keepdim=True) + 1e-6).rsqrt() * weight
        first, second = x.to(kind).float().chunk(2, -1)
        c, s = (t[positions][:, None] for t in (cos, sin))
        return torch.cat([first * c - second * s, second * c + first * s], -1)

    by_head = qkv.view(tokens, -1, size)
    query, key, value = by_head.split([heads, groups, groups], 1)
    cache = [torch.full((slots, groups, size), 7.0).to(DEVICE, kind) for _ in range(2)]
    cos_sin = torch.cat([cos, sin], -1)
    norms = weights[0].to(DEVICE), weights[1].to(DEVICE), 1e-6
    turns, where, to = (t.to(DEVICE) for t in (cos_sin, positions, places))
    given, stream = qkv.to(DEVICE), None
    if width is not None:  # what was projected still lacks its norm
        stream = (torch.randn(tokens, width, device=DEVICE) * 3).to(kind)
        sizes = (stream.float().square().mean(-1, keepdim=True) + norms[2]).sqrt()
        given = (given.float() * sizes).to(kind)
    found = queries_of(given, norms, turns, where, to, cache[0], cache[1], stream)
    keys, values = (c.cpu() for c in cache)
    expected = rotated(query, weights[0]).flatten(1)
    assert (found.cpu().float() - expected).norm() < apart * expected.norm()
    expected = rotated(key, weights[1])
    assert (keys[places].float() - expected).norm() < apart * expected.norm()
    if width is None:
        assert torch.equal(values[places], value)
    else:
        assert (values[places].float() - value.float()).norm() < apart * value.float().norm()
    others = torch.ones(slots).bool().index_fill(0, places, False)
    assert (keys[others] == 7).all()
    assert (values[others] == 7).all()


@pytest.mark.parametrize("columns", [3072, 40])
@pytest.mark.parametrize(("kind", "apart"), [(torch.float32, 1e-5), (torch.bfloat16, 5e-3)])
def test_swiglu_takes_the_norm_that_its_products_lack(columns, kind, apart):
    from rollflow.engines.gpu.swiglu_kernel import swiglu_of

    if INTERPRETED and kind is torch.bfloat16:
        pytest.skip("the interpreter cuts bits off where a GPU rounds")
    torch.manual_seed(0)
    gate_up, stream = torch.randn(5, 2 * columns).to(kind), (torch.randn(5, 96) * 3).to(kind)
    size_of = (stream.double().square().mean(-1, keepdim=True) + 1e-6).sqrt()
    gate, up = (gate_up.double() / size_of).chunk(2, -1)
    expected = torch.nn.functional.silu(gate) * up
    found = swiglu_of(gate_up.to(DEVICE), stream.to(DEVICE), 1e-6)
    assert (found.cpu().double() - expected).norm() < apart * expected.norm()


@pytest.mark.parametrize("count", [1, 4096, 100_003])
def test_additions_are_those_of_pytorch(count):
    from rollflow.engines.gpu.add_kernel import add_to

    torch.manual_seed(0)
    total, part = torch.randn(count, device=DEVICE), torch.randn(count, device=DEVICE).bfloat16()
    expected = total.clone().add_(part)
    add_to(total, part)
    assert torch.equal(total, expected)
