"""PPO's critic learns on the same ranks, is kept in checkpoints, and goes on from them bit by bit."""

import dataclasses

import pytest
import torch
from transformers import AutoModel

from rollflow.engines.algorithms.config import CriticConfig, PpoConfig
from rollflow.engines.algorithms.losses import value_loss
from rollflow.engines.megatron.config import TrainerConfig
from tests.engines.algorithms import scalar

CRITIC = CriticConfig(lr=1e-3)
PPO = PpoConfig(kl_coef=0.0, critic=CRITIC)


def masked(samples):
    """Samples in which a tool spoke: every third token is not the policy's own."""
    return [
        dataclasses.replace(s, loss_mask=[t % 3 != 1 for t in range(len(s.response_ids))])
        for s in samples
    ]


def values_of(body, head, sample):
    """Value before each trained token."""
    tokens = torch.tensor([sample.prompt_ids + sample.response_ids])
    first = len(sample.prompt_ids)
    values = head(body(tokens).last_hidden_state)[0, first - 1 : -1, 0]
    return values[torch.tensor(sample.loss_mask)]


def test_the_critic_learns_as_one_of_transformers_with_the_same_returns(
    one_rank, run, model_path, make_samples
):
    body = AutoModel.from_pretrained(model_path, dtype=torch.float32)
    head = torch.nn.Linear(body.config.hidden_size, 1, bias=False)
    torch.nn.init.zeros_(head.weight)
    parameters = [*body.parameters(), *head.parameters()]
    adamw = torch.optim.AdamW(parameters, lr=CRITIC.lr, weight_decay=0.0)
    metrics: dict[str, float] = {}
    with one_rank(algorithm=PPO, megatron={"lr": 1e-4, "weight_decay": 0.0}) as rank:
        for step in range(3):
            samples = masked(make_samples(step))
            metrics = rank.train(run.commit(step, samples)).metrics
            values = [values_of(body, head, s) for s in samples]
            losses = []
            for sample, own in zip(samples, values, strict=True):
                old = own.tolist()
                rewards = [0.0] * (len(old) - 1) + [sample.reward]
                returns = torch.tensor(scalar.gae(rewards, old, 1.0, PPO.lam)) + own.detach()
                losses.append(value_loss(own, own.detach(), returns, CRITIC.value_clip)[0])
            loss = torch.cat(losses).mean()
            adamw.zero_grad()
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            adamw.step()
            assert metrics["critic/loss"] == pytest.approx(loss.item(), abs=2e-6)
            assert metrics["critic/grad_norm"] == pytest.approx(norm.item(), abs=1e-4)
            assert metrics["critic/value"] == pytest.approx(
                torch.cat(values).mean().item(), abs=2e-6
            )
    assert metrics["critic/value"] != 0


def test_a_checkpoint_holds_the_critic_and_training_goes_on_from_it_bit_by_bit(one_rank, run):
    batches = [run.commit(step) for step in range(4)]
    with one_rank(algorithm=PPO) as rank:
        for batch in batches[:2]:
            rank.train(batch)
        checkpoint = rank.save(1, hf=False)
        live = [rank.train(batch) for batch in batches[2:]]
    with one_rank(algorithm=PPO) as rank:
        rank.restore(checkpoint)
        redone = [rank.train(batch) for batch in batches[2:]]
    for a, b in zip(live, redone, strict=True):
        assert a.weights_digest == b.weights_digest
        assert a.metrics["critic/loss"] == b.metrics["critic/loss"]
        assert a.metrics["critic/grad_norm"] == b.metrics["critic/grad_norm"]


def test_a_checkpoint_of_two_ranks_goes_on_on_one(one_rank, many_ranks, run):
    changes = {"algorithm": PPO, "trainer": TrainerConfig(step_timeout_s=120)}
    batches = [run.commit(step) for step in range(3)]
    with many_ranks(2, **changes) as ranks:
        for batch in batches[:2]:
            ranks.call("train", batch)
        checkpoint = ranks.call("save", 1, False)[0]
        pair = ranks.call("train", batches[2])[0].metrics
    with one_rank(**changes) as rank:
        rank.restore(checkpoint)
        alone = rank.train(batches[2]).metrics
    for name in ("critic/loss", "critic/grad_norm", "train/loss", "train/grad_norm"):
        assert alone[name] == pytest.approx(pair[name], abs=1e-5)


def test_while_it_warms_up_only_the_critic_learns(one_rank, run):
    algorithm = PpoConfig(kl_coef=0.0, critic=CriticConfig(lr=1e-3, warmup_steps=2))
    with one_rank(algorithm=algorithm) as rank:
        first = rank._rank_live.digest()
        found = [rank.train(run.commit(step)) for step in range(3)]
    assert [r.weights_digest == first for r in found] == [True, True, False]
    assert "train/grad_norm" not in found[1].metrics
    assert all(r.metrics["critic/grad_norm"] > 0 for r in found)
