"""A step does what the algorithm says, the same way every time, and stops when a number is off."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM

from rollflow.engines.algorithms.config import (
    CispoConfig,
    CorrectionConfig,
    DapoConfig,
    DistillConfig,
    GrpoConfig,
    PpoConfig,
    ReinforcePlusPlusConfig,
    SftConfig,
)
from rollflow.engines.megatron import look_back
from rollflow.engines.megatron.config import GatesConfig, TrainerConfig
from rollflow.engines.megatron.gates import GateError, check_gradient, check_mismatch
from rollflow.engines.megatron.look_back import needs_own_pass


def reference_logprobs(model, sample, temperature=1.0):
    tokens = torch.tensor([sample.prompt_ids + sample.response_ids])
    first = len(sample.prompt_ids)
    logits = model(tokens).logits[0, first - 1 : -1] / temperature
    return logits.log_softmax(-1).gather(-1, tokens[0, first:, None])[:, 0]


def with_true_logprobs(path, samples, temperature=1.0):
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    with torch.no_grad():
        return [
            dataclasses.replace(
                s, rollout_logprobs=reference_logprobs(model, s, temperature).tolist()
            )
            for s in samples
        ]


def test_supervised_steps_equal_adamw_on_transformers(one_rank, run, model_path, make_samples):
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)
    adamw = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
    with one_rank(algorithm=SftConfig(), megatron={"lr": 1e-3, "weight_decay": 0.0}) as rank:
        for step in range(3):
            samples = make_samples(step)
            loss = -torch.cat([reference_logprobs(model, s) for s in samples]).mean()
            adamw.zero_grad()
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            adamw.step()
            metrics = rank.train(run.commit(step)).metrics
            assert metrics["train/loss"] == pytest.approx(loss.item(), abs=2e-6)
            assert metrics["train/grad_norm"] == pytest.approx(norm.item(), abs=2e-5)
            assert metrics["train/lr"] == 1e-3
            assert metrics["train/tokens"] == sum(len(s.response_ids) for s in samples)


def test_the_validation_loss_is_that_of_transformers_and_changes_nothing(
    one_rank, model_path, make_samples
):
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)
    samples = [
        dataclasses.replace(
            s, loss_mask=[i % 3 != 1 for i in range(len(s.response_ids))], reward=None
        )
        for s in make_samples(0)
    ]
    with torch.no_grad():
        expected = -torch.cat(
            [reference_logprobs(model, s)[torch.tensor(s.loss_mask)] for s in samples]
        )
    for tokens in (4096, 24):
        with one_rank(trainer=TrainerConfig(max_tokens_per_micro_batch=tokens)) as rank:
            before = rank._rank_live.digest()
            found = rank.loss_of(samples)
            assert rank._rank_live.digest() == before
        assert found["loss"] == pytest.approx(expected.mean().item(), abs=2e-6)
        assert found["perplexity"] == pytest.approx(expected.mean().exp().item(), rel=1e-5)
        assert found["tokens"] == len(expected)


@pytest.mark.parametrize("algorithm", [GrpoConfig(), DapoConfig(), SftConfig()])
def test_cutting_into_micro_batches_changes_nothing(one_rank, run, algorithm):
    batch = run.commit(0)
    found = []
    for tokens in (4096, 24):
        trainer = TrainerConfig(max_tokens_per_micro_batch=tokens)
        with one_rank(algorithm=algorithm, trainer=trainer) as rank:
            found.append(rank.train(batch).metrics)
    for name in ("train/loss", "train/grad_norm", "train/entropy"):
        assert found[0][name] == pytest.approx(found[1][name], abs=2e-6)


def test_the_same_inputs_give_bit_equal_weights(one_rank, run):
    batches = [run.commit(step) for step in range(2)]
    digests = []
    for _ in range(2):
        with one_rank() as rank:
            digests.append([rank.train(batch).weights_digest for batch in batches])
    assert digests[0] == digests[1]


def test_the_first_update_has_ratio_one_and_a_second_one_has_not(one_rank, run):
    batch = run.commit(0)
    with one_rank(trainer=TrainerConfig(old_logprobs="always")) as rank:
        one = rank.train(batch).metrics
    assert one["train/ratio_max"] == 1
    assert one["train/ppo_kl"] == 0
    with one_rank(trainer=TrainerConfig(updates_per_batch=2)) as rank:
        two = rank.train(batch).metrics
    assert two["train/ratio_max"] > 1


@pytest.mark.parametrize("tokens", [4096, 24])
@pytest.mark.parametrize(
    "algorithm",
    [GrpoConfig(), GrpoConfig(kl_coef=0.1, correction=CorrectionConfig()), CispoConfig()],
)
def test_the_training_pass_own_logprobs_as_the_old_ones_change_no_bit(
    one_rank, run, algorithm, tokens, monkeypatch
):
    batches = [run.commit(step) for step in range(2)]
    found, passes = {}, []
    real = look_back.logprobs_of
    monkeypatch.setattr(look_back, "logprobs_of", lambda *a: passes.append(1) or real(*a))
    for old in ("always", "auto"):
        passes.clear()
        trainer = TrainerConfig(old_logprobs=old, max_tokens_per_micro_batch=tokens)
        with one_rank(algorithm=algorithm, trainer=trainer) as rank:
            results = [rank.train(batch) for batch in batches]
        found[old] = [
            (r.weights_digest, {k: v for k, v in r.metrics.items() if "perf/" not in k})
            for r in results
        ]
        reference = len(batches) if algorithm.kl_coef else 0
        assert len(passes) == reference + (len(batches) if old == "always" else 0)
    assert found["auto"] == found["always"]
    assert found["auto"][0][1]["mismatch/logprob_gap_max"] > 0


@pytest.mark.parametrize(
    ("algorithm", "trainer", "expected"),
    [
        (GrpoConfig(), TrainerConfig(), False),
        (GrpoConfig(), TrainerConfig(old_logprobs="always"), True),
        (GrpoConfig(), TrainerConfig(updates_per_batch=2), True),
        (ReinforcePlusPlusConfig(), TrainerConfig(), True),
        (DistillConfig(), TrainerConfig(), True),
        (PpoConfig(kl_coef=0.0), TrainerConfig(), True),
        (SftConfig(), TrainerConfig(old_logprobs="always"), False),
    ],
)
def test_old_logprobs_take_a_pass_of_their_own_where_something_asks_before_the_update(
    algorithm, trainer, expected
):
    learner = SimpleNamespace(algorithm=algorithm, trainer=trainer)
    assert needs_own_pass(learner) is expected  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_true_rollout_logprobs_pass_the_gate_and_false_ones_stop_the_run(
    one_rank, run, model_path, make_samples, temperature
):
    samples = with_true_logprobs(model_path, make_samples(0), temperature)
    with one_rank(gates=GatesConfig(), temperature=temperature) as rank:
        before = rank._rank_live.digest()
        wrong = [
            dataclasses.replace(
                samples[0], rollout_logprobs=[x + 0.01 for x in samples[0].rollout_logprobs]
            ),
            *samples[1:],
        ]
        with pytest.raises(GateError, match=r"step 0.*is 0\.01.*gates\.logprob_gap_max = 0\.0001"):
            rank._rank_live.train(wrong, 0)
        assert rank._rank_live.digest() == before
        metrics = rank.train(run.commit(0, samples)).metrics
    assert metrics["mismatch/logprob_gap_max"] < 1e-5
    assert metrics["mismatch/kl"] < 1e-9


def test_tokens_of_older_weights_are_not_held_to_the_gate(one_rank, run, make_samples):
    samples = make_samples(0)
    stale = [dataclasses.replace(s, policy_versions=[7] * len(s.response_ids)) for s in samples]
    with one_rank(gates=GatesConfig()) as rank:
        assert rank.train(run.commit(0, stale)).metrics["mismatch/logprob_gap_max"] > 0.1


def test_the_kl_term_is_to_the_first_weights_also_after_a_restore(one_rank, run):
    algorithm = GrpoConfig(kl_coef=0.1)
    batches = [run.commit(step) for step in range(3)]
    with one_rank(algorithm=algorithm) as rank:
        kls = [rank.train(batch).metrics["train/kl"] for batch in batches[:2]]
        checkpoint = rank.save(1, hf=False)
        kls.append(rank.train(batches[2]).metrics["train/kl"])
    assert kls[0] == 0
    assert 0 < kls[1] < kls[2]
    with one_rank(algorithm=algorithm) as rank:
        rank.restore(checkpoint)
        assert rank.train(batches[2]).metrics["train/kl"] == kls[2]


def test_a_batch_is_trained_on_once_and_in_order(one_rank, run):
    first, later = run.commit(0), run.commit(2)
    with one_rank() as rank:
        result = rank.train(first)
        assert rank.train(first) is result
        assert result.version == 1
        with pytest.raises(ValueError, match="batch of step 2 for weights of version 1"):
            rank.train(later)
        with pytest.raises(ValueError, match="version 4 from weights of version 1"):
            rank.push_weights([], 4)


def test_a_batch_without_anything_to_train_on_is_an_error(one_rank, run, make_samples):
    samples = make_samples(
        0,
        loss_mask=[False] * 3,
        response_ids=[1, 2, 3],
        rollout_logprobs=[0.0] * 3,
        policy_versions=[0] * 3,
    )
    with one_rank() as rank, pytest.raises(ValueError, match="none of the batch's 12 samples"):
        rank.train(run.commit(0, samples))


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ({"lr_decay_style": "linear"}, [5e-4, 1e-3, 5.5e-4, 1e-4]),
        (
            {"lr_decay_style": "inverse-square-root"},
            [5e-4, 1e-3, 1e-3 * (2 / 3) ** 0.5, 1e-3 * 0.5**0.5],
        ),
        (
            {"lr_decay_style": "WSD", "lr_wsd_decay_steps": 1, "lr_wsd_decay_style": "linear"},
            [5e-4, 1e-3, 1e-3, 1e-4],
        ),
    ],
)
def test_the_learning_rate_rises_from_its_first_share_and_falls_by_its_style(
    one_rank, run, schedule, expected
):
    trainer = TrainerConfig(lr_warmup_steps=2, lr_decay_steps=4, **schedule)
    megatron = {"lr": 1e-3, "min_lr": 1e-4}
    with one_rank(trainer=trainer, megatron=megatron) as rank:
        rates = [rank.train(run.commit(step)).metrics["train/lr"] for step in range(4)]
    assert rates == pytest.approx(expected)


def test_gates_let_no_nan_through():
    nan = float("nan")
    metrics = {
        "mismatch/logprob_gap_max": nan,
        "mismatch/logprob_gap_mean": nan,
        "mismatch/kl": nan,
    }
    with pytest.raises(GateError, match="nan"):
        check_mismatch(GatesConfig(), "float32", metrics, 3)
    with pytest.raises(GateError, match=r"mismatch_kl|logprob_gap_mean"):
        check_mismatch(GatesConfig(), "bfloat16", metrics, 3)
    for norm in (nan, float("inf")):
        with pytest.raises(GateError, match="not applied"):
            check_gradient(norm, 3)
