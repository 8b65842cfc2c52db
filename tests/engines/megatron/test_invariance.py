"""A batch has one gradient: packed, cut into micro-batches, sample by sample or over ranks.

The reference is transformers in float64 on samples padded to one length, with the losses of
``algorithms.scalar``; its own rounding is nothing. What is left between layouts is float32's, of the
model's passes: transformers in float32 is as far from its float64 self (``-s`` prints all of it), and
further for a model whose weights are larger.
"""

import dataclasses
import itertools

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from rollflow.engines.algorithms.config import (
    DapoConfig,
    GrpoConfig,
    GspoConfig,
    ReinforcePlusPlusConfig,
)
from rollflow.engines.megatron.batch import plan_micro_batches
from rollflow.engines.megatron.config import TrainerConfig
from tests.engines.algorithms import scalar
from tests.engines.megatron.weights_of_rank import gradients_of_rank

BAR = 1e-6
ALGORITHMS = {
    "grpo": GrpoConfig(reduction="episode", entropy_coef=0.01),
    "dapo": DapoConfig(),
    "gspo": GspoConfig(),
    "reinforce_pp": ReinforcePlusPlusConfig(kl_coef=0.1, gamma=0.9),
}
LAYOUTS = {
    "one micro-batch": (1, 4096),
    "several micro-batches": (1, 40),
    "each sample alone": (1, 1),
    "two ranks": (2, 4096),
    "two ranks, several micro-batches": (2, 24),
}


@pytest.fixture
def samples(make_samples):
    """Ragged, with a tool's tokens in between; the first two of a group are one episode."""
    return [
        dataclasses.replace(
            sample,
            loss_mask=[t % 4 != 2 for t in range(len(sample.response_ids))],
            episode_id=f"{sample.group_id}-{max(1, sample.index)}",
        )
        for sample in make_samples(0)
    ]


def test_the_layouts_are_what_their_names_say(samples):
    lengths = [len(s.prompt_ids) + len(s.response_ids) - 1 for s in samples]
    for name, (ranks, max_tokens) in LAYOUTS.items():
        micro_batches = len(plan_micro_batches(lengths, ranks, max_tokens)[0])
        if "several" in name:
            assert 1 < micro_batches < len(samples) // ranks
        else:
            assert micro_batches == (len(samples) if "alone" in name else 1)


@pytest.mark.parametrize("config", ALGORITHMS.values(), ids=ALGORITHMS.keys())
def test_the_gradient_is_the_same_however_the_batch_is_laid_out(
    one_rank, many_ranks, run, model_path, samples, config
):
    batch = run.commit(0, samples)
    found = {}
    for name, (ranks, max_tokens) in LAYOUTS.items():
        if ranks == 1:
            with one_rank(**settings(config, max_tokens)) as rank:
                rank.train(batch)
                found[name] = gradients_of_rank(rank)
        else:
            with many_ranks(ranks, **settings(config, max_tokens)) as several:
                several.call("train", batch)
                found[name], other = several.call("gradients")
                assert distance(other, found[name]) == 0
    found["padded, by transformers"] = reference(model_path, config, samples, torch.float32)
    exact = reference(model_path, config, samples, torch.float64)
    for name, gradient in found.items():
        print(f"{name}: {distance(gradient, exact):.2e} of float64")
    for (one, a), (another, b) in itertools.combinations(found.items(), 2):
        print(f"{one} and {another}: {distance(a, b):.2e}")
        assert distance(a, b) <= BAR
    assert max(distance(gradient, exact) for gradient in found.values()) <= BAR


def test_gradients_that_are_not_summed_over_ranks_are_noticed(many_ranks, run, model_path, samples):
    config = DapoConfig()
    with many_ranks(2, **settings(config, 4096)) as ranks:
        ranks.call("break", "no_finalize")
        ranks.call("train", run.commit(0, samples))
        ranks.call("mend")
        [gradient, _] = ranks.call("gradients")
    assert distance(gradient, reference(model_path, config, samples, torch.float64)) > 1000 * BAR


def settings(config, max_tokens):
    return {
        "algorithm": config,
        "trainer": TrainerConfig(max_tokens_per_micro_batch=max_tokens, step_timeout_s=120),
        # Without clipping, which would scale the gradients that stand after a step.
        "megatron": {"lr": 1e-3, "clip_grad": 0.0},
    }


def distance(gradient, expected):
    """Norm of the difference over the norm, of all weights together."""
    assert gradient.keys() == expected.keys()
    difference, norm = 0.0, 0.0
    for name, exact in expected.items():
        difference += np.square(gradient[name].astype(np.float64) - exact).sum()
        norm += np.square(exact.astype(np.float64)).sum()
    return float(np.sqrt(difference / norm))


def reference(path, config, samples, dtype):
    """The gradient by transformers and the scalar losses, on fresh weights: all ratios are 1."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
    tokens = [torch.tensor(s.prompt_ids + s.response_ids) for s in samples]
    padded = torch.nn.utils.rnn.pad_sequence(tokens, batch_first=True)
    real = torch.arange(padded.shape[1]) < torch.tensor([[len(t)] for t in tokens])
    log_p = model(padded, attention_mask=real.long()).logits.log_softmax(-1)
    rows = [trained_tokens(s, log_p[i]) for i, s in enumerate(samples)]
    with_advantages(config, samples, rows)
    loss = scalar.reduced(config, rows, [s.episode_id for s in samples])
    names, weights = zip(*model.named_parameters(), strict=True)
    gradients = torch.autograd.grad(torch.as_tensor(loss), weights)
    return {name: gradient.numpy() for name, gradient in zip(names, gradients, strict=True)}


def trained_tokens(sample, log_p):
    """What the scalar losses take of each trained token."""
    first = len(sample.prompt_ids)
    row = []
    for t, (token, trained) in enumerate(zip(sample.response_ids, sample.loss_mask, strict=True)):
        if trained:
            of_token = log_p[first + t - 1]
            new = of_token[token]
            same = dict.fromkeys(("old", "ref", "teacher"), new.detach())
            row.append({"new": new, "entropy": -(of_token.exp() * of_token).sum(), **same})
    return row


def with_advantages(config, samples, rows):
    """Give every token its advantage, from the rewards of the whole batch."""
    outcomes = [s.reward for s in samples]
    if config.advantage != "return":
        groups, episodes = [s.group_id for s in samples], [s.episode_id for s in samples]
        outcomes = scalar.group_outcomes(outcomes, groups, episodes, config.advantage)
    advantages = [
        scalar.advantages_of(config, r, o)[0] for r, o in zip(rows, outcomes, strict=True)
    ]
    if config.whiten:
        advantages = scalar.whitened(advantages)
    for row, own in zip(rows, advantages, strict=True):
        for token, advantage in zip(row, own, strict=True):
            token["advantage"] = torch.tensor(advantage, dtype=torch.float64)
