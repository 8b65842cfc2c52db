"""The whole loss: packed, cut into micro-batches, cut into ranks, or reckoned by hand."""

import math
from dataclasses import fields, replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rollflow.engines.algorithms.config import GrpoConfig, SftConfig
from rollflow.engines.algorithms.metrics import Metrics
from rollflow.engines.algorithms.policy import (
    LossInputs,
    compute_advantages,
    compute_loss,
    needs,
)
from rollflow.engines.algorithms.reduction import token_weights

SETTINGS = [
    GrpoConfig(),
    GrpoConfig(reduction="sequence", eps_clip=0.1, eps_clip_high=0.1),
    GrpoConfig(kl_coef=0.3, kl_type="k1", entropy_coef=0.01),
    GrpoConfig(kl_coef=0.3, kl_type="k2", reduction="sequence"),
    GrpoConfig(kl_coef=0.3, kl_type="k3", entropy_coef=0.01, reduction="sequence"),
    SftConfig(),
    SftConfig(reduction="sequence"),
]
IDS = ["grpo", "grpo-sequence", "k1", "k2-sequence", "k3-sequence", "sft", "sft-sequence"]
masks_of_samples = st.lists(st.lists(st.booleans(), min_size=1, max_size=7), min_size=1, max_size=7)


def make_batch(masks, seed, reduction):
    """A list of LossInputs, one per sample, in float64, and its bool masks."""
    generator = torch.Generator().manual_seed(seed)
    weights = token_weights([torch.tensor(m) for m in masks], reduction)
    samples = []
    for weight in weights:
        new, old, ref, entropy = -torch.rand(4, len(weight), generator=generator).double()
        advantage = torch.randn(1, generator=generator).double().expand(len(weight))
        samples.append(LossInputs(new, weight.double(), -entropy, advantage, old, ref))
    return samples


def pack(samples):
    packed = {
        field.name: torch.cat([getattr(sample, field.name) for sample in samples])
        for field in fields(LossInputs)
    }
    return LossInputs(**packed)


def reference_token(config, new, entropy, advantage, old, ref):
    """(loss, derivative in new, derivative in entropy) of one trained token."""
    if isinstance(config, SftConfig):
        return -new, -1.0, 0.0
    ratio = math.exp(new - old)
    bounded = min(max(ratio, 1 - config.eps_clip), 1 + config.eps_clip_high)
    clipped = -bounded * advantage > -ratio * advantage
    loss, slope = (-bounded * advantage, 0.0) if clipped else (-ratio * advantage,) * 2
    log_ratio = new - ref
    kl, kl_slope = {
        "k1": (log_ratio, 1.0),
        "k2": (log_ratio**2 / 2, log_ratio),
        "k3": (math.exp(-log_ratio) - 1 + log_ratio, 1 - math.exp(-log_ratio)),
    }[config.kl_type]
    return (
        loss + config.kl_coef * kl - config.entropy_coef * entropy,
        slope + config.kl_coef * kl_slope,
        -config.entropy_coef,
    )


def reference_loss(config, samples, masks):
    """(loss, gradients in the log-probabilities, gradients in the entropies) of a mini-batch."""
    total, on_new, on_entropy = 0.0, [], []
    trained = [sum(mask) for mask in masks]
    for sample, mask in zip(samples, masks, strict=True):
        share = sum(trained)
        if config.reduction == "sequence":
            share = sum(n > 0 for n in trained) * sum(mask)
        for t, kept in enumerate(mask):
            names = ("logprobs_T", "entropy_T", "advantages_T", "old_logprobs_T", "ref_logprobs_T")
            token = [getattr(sample, name)[t].item() for name in names]
            loss, a, b = reference_token(config, *token) if kept else (0.0, 0.0, 0.0)
            total += loss / max(share, 1)
            on_new.append(a / max(share, 1))
            on_entropy.append(b / max(share, 1))
    return total, on_new, on_entropy


def with_gradient(inputs):
    assert inputs.entropy_T is not None
    return replace(
        inputs,
        logprobs_T=inputs.logprobs_T.clone().requires_grad_(),
        entropy_T=inputs.entropy_T.clone().requires_grad_(),
    )


def run(config, micro_batches):
    """(loss, gradient of the packed log-probabilities, gradient of the entropies, metrics)."""
    total, on_new, on_entropy, metrics = 0.0, [], [], Metrics()
    for micro_batch in micro_batches:
        inputs = with_gradient(pack(micro_batch))
        loss, piece = compute_loss(config, inputs)
        loss.backward()
        for found, tensor in ((on_new, inputs.logprobs_T), (on_entropy, inputs.entropy_T)):
            assert tensor is not None
            found.append(torch.zeros_like(tensor) if tensor.grad is None else tensor.grad)
        total += loss.item()
        metrics = metrics.merge(piece)
    return total, torch.cat(on_new), torch.cat(on_entropy), metrics.values()


@pytest.mark.parametrize("config", SETTINGS, ids=IDS)
@given(masks=masks_of_samples, seed=st.integers(0, 10**6))
def test_the_loss_equals_the_scalar_reference_in_value_and_gradient(config, masks, seed):
    samples = make_batch(masks, seed, config.reduction)
    loss, on_new, on_entropy, metrics = run(config, [samples])
    expected, expected_new, expected_entropy = reference_loss(config, samples, masks)
    assert loss == pytest.approx(expected, rel=1e-6, abs=1e-7)
    assert on_new.tolist() == pytest.approx(expected_new, rel=1e-6, abs=1e-7)
    assert on_entropy.tolist() == pytest.approx(expected_entropy, rel=1e-6, abs=1e-7)
    assert metrics["train/loss"] == pytest.approx(expected, rel=1e-6, abs=1e-7)


@pytest.mark.parametrize("config", SETTINGS, ids=IDS)
@given(masks=masks_of_samples, seed=st.integers(0, 10**6), cuts=st.sets(st.integers(1, 6)))
def test_it_does_not_matter_how_a_batch_is_cut(config, masks, seed, cuts):
    samples = make_batch(masks, seed, config.reduction)
    edges = [0, *sorted(cut for cut in cuts if cut < len(samples)), len(samples)]
    pieces = [samples[a:b] for a, b in pairwise(edges)]
    whole, parts = run(config, [samples]), run(config, pieces)
    assert parts[0] == pytest.approx(whole[0], rel=1e-12, abs=1e-12)
    torch.testing.assert_close(parts[1], whole[1], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(parts[2], whole[2], rtol=1e-12, atol=1e-12)
    assert parts[3] == pytest.approx(whole[3], rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("config", SETTINGS, ids=IDS)
def test_what_stands_at_tokens_that_are_not_trained_on_does_not_matter(config):
    masks = [[False, True, True], [False, False], [True]]
    samples = make_batch(masks, 1, config.reduction)
    spoiled = [
        replace(
            sample,
            **{
                field.name: getattr(sample, field.name).masked_fill(~torch.tensor(mask), torch.nan)
                for field in fields(LossInputs)
                if field.name != "weights_T"
            },
        )
        for sample, mask in zip(samples, masks, strict=True)
    ]
    clean, dirty = run(config, [samples]), run(config, [spoiled])
    assert dirty[0] == clean[0]
    assert torch.equal(dirty[1], clean[1])
    assert dirty[3] == clean[3]


def test_on_fresh_weights_the_ratio_is_exactly_one_and_the_kl_exactly_zero():
    samples = make_batch([[True] * 5, [True] * 3], 2, "token")
    fresh = [replace(s, old_logprobs_T=s.logprobs_T.clone()) for s in samples]
    metrics = run(GrpoConfig(), [fresh])[3]
    assert metrics["train/ratio_max"] == 1.0
    assert metrics["train/log_ratio_max"] == 0.0
    assert metrics["train/ppo_kl"] == 0.0
    assert metrics["train/pg_clipfrac"] == 0.0


def test_diagnostics_are_means_over_trained_tokens():
    inputs = LossInputs(
        logprobs_T=torch.tensor([-1.0, -1.0, -1.0, -7.0]),
        weights_T=torch.tensor([0.5, 0.25, 0.25, 0.0]),
        entropy_T=torch.tensor([1.0, 2.0, 3.0, 9.0]),
        advantages_T=torch.tensor([1.0, -1.0, 1.0, 1.0]),
        old_logprobs_T=torch.tensor([-2.0, -1.0, -1.0, 0.0]),
    )
    metrics = compute_loss(GrpoConfig(), inputs).metrics.values()
    assert metrics == pytest.approx(
        {
            "train/loss": -1.28 * 0.5,
            "train/pg_loss": -1.28 * 0.5,
            "train/pg_clipfrac": 1 / 3,
            "train/ppo_kl": -1 / 3,
            "train/entropy": 2.0,
            "train/ratio_max": math.e,
            "train/log_ratio_max": 1.0,
        },
        rel=1e-6,
    )


@pytest.mark.parametrize("config", SETTINGS, ids=IDS)
def test_a_micro_batch_without_a_trained_token_has_the_same_metric_names_and_no_share(config):
    full = make_batch([[True]], 3, config.reduction)
    empty = [replace(full[0], weights_T=torch.zeros(1, dtype=torch.float64))]
    assert run(config, [empty])[3].keys() == run(config, [full])[3].keys()
    assert run(config, [full, empty])[3] == run(config, [full])[3]
    assert run(config, [empty])[0] == 0.0


def test_a_sample_that_failed_counts_in_no_group():
    config = GrpoConfig(normalize_std=False)
    got = compute_advantages(config, [1.0, None, 0.0, None], ["a", "a", "a", "b"])
    assert got.tolist() == [0.5, 0.0, -0.5, 0.0]
    assert got.dtype == torch.float32
    assert compute_advantages(config, [None, None], ["a", "b"]).tolist() == [0.0, 0.0]


def test_the_std_setting_reaches_the_advantages():
    got = compute_advantages(GrpoConfig(), [3.0, 0.0, 0.0, 0.0], ["a"] * 4)
    assert got.tolist() == pytest.approx([1.5, -0.5, -0.5, -0.5], rel=1e-5)


def test_supervised_training_has_no_advantages_and_needs_only_labels():
    assert compute_advantages(SftConfig(), [None, 2.0], ["a", "a"]).tolist() == [0.0, 0.0]
    assert needs(SftConfig()) == (False, False, False)
    assert needs(GrpoConfig()) == (True, True, False)
    assert needs(GrpoConfig(kl_coef=0.1)).ref_logprobs


@pytest.mark.parametrize(
    ("config", "missing"),
    [
        (GrpoConfig(), "old_logprobs_T"),
        (GrpoConfig(), "advantages_T"),
        (GrpoConfig(kl_coef=0.1), "ref_logprobs_T"),
        (GrpoConfig(entropy_coef=0.1), "entropy_T"),
    ],
)
def test_a_missing_tensor_is_named(config, missing):
    inputs = replace(make_batch([[True]], 4, "token")[0], **{missing: None})
    with pytest.raises(ValueError, match=f"{missing} is missing"):
        compute_loss(config, inputs)


def test_a_misshapen_tensor_is_named():
    inputs = replace(make_batch([[True]], 5, "token")[0], advantages_T=torch.zeros(2))
    with pytest.raises(ValueError, match=r"advantages_T has shape \(2,\)"):
        compute_loss(GrpoConfig(), inputs)
