"""The whole of each algorithm: packed, cut into micro-batches, or reckoned token by token."""

import math
from dataclasses import fields, replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rollflow.engines.algorithms.config import (
    CriticConfig,
    DapoConfig,
    DistillConfig,
    DrGrpoConfig,
    GrpoConfig,
    GspoConfig,
    PpoConfig,
    ReinforcePlusPlusConfig,
    SftConfig,
)
from rollflow.engines.algorithms.inputs import AdvantageInputs, LossInputs, ValueInputs
from rollflow.engines.algorithms.policy import (
    compute_advantages,
    compute_loss,
    compute_outcomes,
    compute_value_loss,
    needs,
)
from tests.engines.algorithms import scalar
from tests.engines.algorithms.batches import (
    COLUMNS,
    Batch,
    corrected,
    each_setting,
    masks_of_samples,
    run,
    slopes,
)


@each_setting
@settings(max_examples=15)
@given(masks=masks_of_samples, seed=st.integers(0, 10**6))
def test_the_loss_equals_the_scalar_reference_in_value_and_gradient(config, masks, seed):
    batch = Batch(config, masks, seed)
    loss, on_new, on_entropy, metrics = run(config, [batch.loss_inputs()])
    samples = batch.samples(gradient=("new", "entropy"))
    expected = scalar.reduced(config, samples, batch.episodes)
    if isinstance(expected, torch.Tensor):
        expected.backward()
        expected = expected.item()
    assert loss == pytest.approx(expected, rel=1e-6, abs=1e-7)
    for found, name in ((on_new, "new"), (on_entropy, "entropy")):
        slope = batch.spread(slopes(samples, name))
        assert found.tolist() == pytest.approx(slope, rel=1e-6, abs=1e-7)
    total = sum(float(w.sum()) for w in batch.weights)
    assert metrics["train/loss"] * total == pytest.approx(expected, rel=1e-6, abs=1e-7)


@each_setting
@settings(max_examples=15)
@given(masks=masks_of_samples, seed=st.integers(0, 10**6))
def test_advantages_equal_the_scalar_reference_token_by_token(config, masks, seed):
    if config.name == "sft":
        return
    batch = Batch(config, masks, seed)
    outcomes = compute_outcomes(config, batch.rewards, batch.groups, batch.episodes)
    expected_outcomes = batch.rewards
    if config.advantage == "none":
        expected_outcomes = [0.0] * len(masks)
    elif config.advantage not in ("return", "gae"):
        expected_outcomes = scalar.group_outcomes(
            batch.rewards, batch.groups, batch.episodes, config.advantage
        )
    assert outcomes.tolist() == pytest.approx(expected_outcomes, rel=1e-6, abs=1e-7)
    samples = batch.samples()
    kept = torch.cat(batch.masks)
    packed = {n: torch.cat([c[n] for c in batch.columns])[kept] for n in COLUMNS}
    counts = torch.tensor([len(s) for s in samples])
    got = compute_advantages(
        config,
        AdvantageInputs(
            outcomes_T=outcomes.repeat_interleave(counts),
            segments_T=torch.arange(len(samples)).repeat_interleave(counts),
            old_logprobs_T=packed["old"],
            ref_logprobs_T=packed["ref"],
            values_T=packed["value"],
            teacher_logprobs_T=packed["teacher"],
        ),
    )
    pairs = [
        scalar.advantages_of(config, s, o)
        for s, o in zip(samples, expected_outcomes, strict=True)
        if s
    ]
    expected = [a for advantages, _ in pairs for a in advantages]
    assert got.advantages_T.tolist() == pytest.approx(expected, rel=1e-5, abs=1e-5)
    if config.advantage == "gae":
        assert got.returns_T is not None
        returns = [r for _, more in pairs for r in more or ()]
        assert got.returns_T.tolist() == pytest.approx(returns, rel=1e-5, abs=1e-5)


@given(masks=masks_of_samples, seed=st.integers(0, 10**6), clip=st.floats(0.05, 1.0))
def test_the_value_loss_equals_the_scalar_reference_in_value_and_gradient(masks, seed, clip):
    batch = Batch(PpoConfig(), masks, seed)
    values, old, returns = (torch.cat([c[n] for c in batch.columns]) for n in COLUMNS[5:8])
    values = values.clone().requires_grad_()
    weights = torch.cat(batch.weights)
    inputs = ValueInputs(values, old, returns, weights)
    loss = compute_value_loss(CriticConfig(value_clip=clip), inputs).loss
    loss.backward()
    leaves = [v.clone().requires_grad_() for v in values.detach()]
    terms = [
        w * scalar.value_term(v, o.item(), r.item(), clip)
        for v, o, r, w in zip(leaves, old, returns, weights, strict=True)
    ]
    expected = torch.stack(terms).sum()
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6, abs=1e-9)
    assert values.grad is not None
    slope = [0.0 if leaf.grad is None else leaf.grad.item() for leaf in leaves]
    assert values.grad.tolist() == pytest.approx(slope, rel=1e-6, abs=1e-9)


@each_setting
@settings(max_examples=15)
@given(masks=masks_of_samples, seed=st.integers(0, 10**6), cuts=st.sets(st.integers(1, 6)))
def test_it_does_not_matter_how_a_batch_is_cut(config, masks, seed, cuts):
    samples = Batch(config, masks, seed).loss_inputs()
    edges = [0, *sorted(cut for cut in cuts if cut < len(samples)), len(samples)]
    pieces = [samples[a:b] for a, b in pairwise(edges)]
    whole, parts = run(config, [samples]), run(config, pieces)
    assert parts[0] == pytest.approx(whole[0], rel=1e-12, abs=1e-12)
    torch.testing.assert_close(parts[1], whole[1], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(parts[2], whole[2], rtol=1e-12, atol=1e-12)
    assert parts[3] == pytest.approx(whole[3], rel=1e-9, abs=1e-12)


@each_setting
def test_what_stands_at_tokens_that_are_not_trained_on_does_not_matter(config):
    masks = [[False, True, True], [False, False], [True]]
    samples = Batch(config, masks, 1).loss_inputs()
    spoiled = [
        replace(
            sample,
            **{
                field.name: getattr(sample, field.name).masked_fill(~torch.tensor(mask), torch.nan)
                for field in fields(LossInputs)
                if field.name not in ("weights_T", "segments_T")
            },
        )
        for sample, mask in zip(samples, masks, strict=True)
    ]
    clean, dirty = run(config, [samples]), run(config, [spoiled])
    assert dirty[0] == clean[0]
    assert torch.equal(dirty[1], clean[1])
    assert dirty[3] == clean[3]


def test_on_fresh_weights_the_ratio_is_exactly_one_and_the_kl_exactly_zero():
    samples = Batch(GrpoConfig(), [[True] * 5, [True] * 3], 2).loss_inputs()
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
        rollout_logprobs_T=torch.tensor([-2.0, -1.0, -1.0, 0.0]),
    )
    metrics = compute_loss(DapoConfig(), inputs).metrics.values()
    assert metrics == pytest.approx(
        {
            "train/loss": -1.28 * 0.5,
            "train/pg_loss": -1.28 * 0.5,
            "train/pg_clipfrac": 1 / 3,
            "train/clipfrac_low": 0.0,
            "train/clipfrac_high": 1 / 3,
            "train/ppo_kl": -1 / 3,
            "train/ratio": (math.e + 2) / 3,
            "train/ratio_sq": (math.e**2 + 2) / 3,
            "train/kl_rollout": (math.e - 2) / 3,
            "train/entropy": 2.0,
            "train/ratio_max": math.e,
            "train/inverse_ratio_max": 1.0,
            "train/log_ratio_max": 1.0,
        },
        rel=1e-6,
    )


@each_setting
def test_a_micro_batch_without_a_trained_token_has_the_same_metric_names_and_no_share(config):
    full = Batch(config, [[True]], 3).loss_inputs()
    empty = [replace(full[0], weights_T=torch.zeros(1, dtype=torch.float64))]
    assert run(config, [empty])[3].keys() == run(config, [full])[3].keys()
    assert run(config, [full, empty])[3] == run(config, [full])[3]
    assert run(config, [empty])[0] == 0.0


def test_a_sample_that_failed_counts_in_no_group():
    config = DrGrpoConfig()
    got = compute_outcomes(config, [1.0, None, 0.0, None], ["a", "a", "a", "b"])
    assert got.tolist() == [0.5, 0.0, -0.5, 0.0]
    assert got.dtype == torch.float32
    assert compute_outcomes(config, [None, None], ["a", "b"]).tolist() == [0.0, 0.0]


def test_supervised_training_has_no_advantages_and_needs_only_labels():
    assert compute_outcomes(SftConfig(), [None, 2.0], ["a", "a"]).tolist() == [0.0, 0.0]
    assert not any(needs(SftConfig()))


def test_each_algorithm_asks_for_what_it_uses_and_no_more():
    assert needs(GrpoConfig()) == (True, True, False, False, False, False)
    assert needs(GrpoConfig(kl_coef=0.1)).ref_logprobs
    assert needs(GrpoConfig(kl_watch=True)).ref_logprobs
    assert needs(PpoConfig(kl_coef=0)) == (True, True, False, True, False, False)
    assert needs(DistillConfig()) == (False, True, False, False, True, True)


@pytest.mark.parametrize(
    ("config", "missing"),
    [
        (GrpoConfig(), "old_logprobs_T"),
        (GrpoConfig(), "advantages_T"),
        (GrpoConfig(kl_coef=0.1), "ref_logprobs_T"),
        (GrpoConfig(entropy_coef=0.1), "entropy_T"),
        (GspoConfig(), "segments_T"),
        (corrected("token", "mask"), "rollout_logprobs_T"),
        (GrpoConfig(off_policy_delta=1.0), "rollout_logprobs_T"),
    ],
)
def test_a_missing_tensor_is_named(config, missing):
    inputs = replace(Batch(config, [[True]], 4).loss_inputs()[0], **{missing: None})
    with pytest.raises(ValueError, match=f"{missing} is missing"):
        compute_loss(config, inputs)


@pytest.mark.parametrize(
    ("config", "missing"),
    [
        (PpoConfig(kl_coef=0), "values_T"),
        (ReinforcePlusPlusConfig(), "ref_logprobs_T"),
        (DistillConfig(), "teacher_logprobs_T"),
    ],
)
def test_what_an_advantage_misses_is_named(config, missing):
    inputs = AdvantageInputs(
        torch.ones(1), torch.zeros(1, dtype=torch.long), old_logprobs_T=torch.zeros(1)
    )
    with pytest.raises(ValueError, match=f"{missing} is missing"):
        compute_advantages(config, inputs)


def test_a_misshapen_tensor_is_named():
    batch = Batch(GrpoConfig(), [[True]], 5)
    inputs = replace(batch.loss_inputs()[0], advantages_T=torch.zeros(2))
    with pytest.raises(ValueError, match=r"advantages_T has shape \(2,\)"):
        compute_loss(GrpoConfig(), inputs)


def test_an_advantage_and_a_loss_of_ones_own_take_the_place_of_ours():
    config = GrpoConfig(advantage="my:advantage", loss="my:loss", kl_coef=0.5, kl_type="k2")
    found = compute_outcomes(
        config, [1.0, None, 3.0], ["a", "a", "b"], own=lambda outcomes: 2 * outcomes.rewards_N
    )
    assert found.tolist() == [2.0, 0.0, 6.0]
    inputs = LossInputs(
        logprobs_T=torch.tensor([-1.0, -2.0], requires_grad=True),
        weights_T=torch.tensor([0.5, 0.5]),
        advantages_T=torch.tensor([1.0, -1.0]),
        old_logprobs_T=torch.tensor([-1.0, -2.0]),
        ref_logprobs_T=torch.tensor([-2.0, -2.0]),
    )
    loss = compute_loss(config, inputs, lambda i: i.logprobs_T * 3).loss
    assert loss.item() == pytest.approx(-4.5 + 0.5 * 0.25)
    for wrong in (lambda i: i.logprobs_T[:1], lambda i: i.logprobs_T / 0):
        with pytest.raises(ValueError, match=r"loss = 'my:loss' gave (a tensor of|2 of 2 numbers)"):
            compute_loss(config, inputs, wrong)
    with pytest.raises(ValueError, match="none was given"):
        compute_loss(config, inputs)


def test_a_sample_that_gspo_clips_is_counted_on_the_side_of_its_own_ratio():
    # The sample is likelier than it was; its second token is not.
    inputs = LossInputs(
        logprobs_T=torch.tensor([-1.0, -3.0]),
        weights_T=torch.tensor([0.5, 0.5]),
        advantages_T=torch.tensor([1.0, 1.0]),
        old_logprobs_T=torch.tensor([-3.0, -2.8]),
        segments_T=torch.tensor([0, 0]),
    )
    metrics = compute_loss(GspoConfig(), inputs).metrics.values()
    assert (metrics["train/clipfrac_low"], metrics["train/clipfrac_high"]) == (0.0, 1.0)


@pytest.mark.parametrize(
    ("own", "message"),
    [
        (lambda inputs: [1.0], "gave list; give a tensor"),
        (lambda inputs: None, "gave NoneType; give a tensor"),
        (lambda inputs: inputs.logprobs_T.sum(), r"shape \(\); give one of \(5,\)"),
        (lambda inputs: inputs.logprobs_T / 0, "gave 5 of 5 numbers that are not finite"),
        (lambda inputs: -inputs.logprobs_T.detach(), "gave a tensor without a gradient"),
    ],
)
def test_a_loss_of_ones_own_that_gives_something_else_is_told_so(own, message):
    config = GrpoConfig(loss="my:fn")
    [inputs] = Batch(config, [[True] * 5], 1).loss_inputs()
    with pytest.raises((TypeError, ValueError), match=message):
        compute_loss(config, replace(inputs, logprobs_T=inputs.logprobs_T.requires_grad_()), own)
