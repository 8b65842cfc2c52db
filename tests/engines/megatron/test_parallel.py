"""However the model is laid over ranks, five optimizer steps are those of transformers and AdamW."""

import itertools
import os
from dataclasses import replace
from types import MethodType
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from rollflow.engines.algorithms.config import SftConfig
from rollflow.engines.config import ModelConfig
from rollflow.engines.megatron.config import TrainerConfig
from rollflow.storage.samples import EXPERTS_DTYPE

STEPS = 5
LAYERS, PER_TOKEN = 2, 2
LOSS, WEIGHTS, LARGEST = 1e-6, 1e-5, 1e-4
TP2 = {"tensor_model_parallel_size": 2}
SP = {**TP2, "sequence_parallel": True}
PP2 = {"pipeline_model_parallel_size": 2}
CP2 = {"context_parallel_size": 2}
EP2 = {"expert_model_parallel_size": 2}
RECOMPUTE = {
    "recompute_granularity": "full",
    "recompute_method": "uniform",
    "recompute_num_layers": 1,
}
DISTRIBUTED = {"use_distributed_optimizer": True}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "TP2": (2, TP2),
    "TP2+SP": (2, SP),
    "PP2": (2, PP2),
    "CP2": (2, CP2),
    "DP2": (2, {}),
    "TP2xDP2": (4, TP2),
    "PP2xTP2": (4, {**PP2, **TP2}),
    "PP2xCP2": (4, {**PP2, **CP2}),
    "TP2xCP2+SP": (4, {**SP, **CP2}),
}
EXPERTS: dict[str, tuple[int, dict[str, Any]]] = {
    "EP2": (2, EP2),
    "EP2xTP2+SP, expert TP1": (4, {**EP2, **SP, "expert_tensor_parallel_size": 1}),
    "EP2xPP2": (4, {**EP2, **PP2}),
}
REPLAYED: dict[str, tuple[int, dict[str, Any]]] = {
    "PP2": (2, PP2),
    "EP2xTP2+SP, expert TP1": EXPERTS["EP2xTP2+SP, expert TP1"],
    "CP2": (2, CP2),
    "EP2xPP2": EXPERTS["EP2xPP2"],
}
ONLY_IN_FULL = ("PP2xCP2", "EP2xPP2")
VARIANTS = {
    "": {},
    "recompute": RECOMPUTE,
    "distributed": DISTRIBUTED,
    "recompute+distributed": {**RECOMPUTE, **DISTRIBUTED},
}


def chosen(layouts):
    """Every layout with every variant by `make parity`; in the suite each with one of them."""
    if os.environ.get("ROLLFLOW_PARITY") == "all":
        return [(layout, variant) for layout in layouts for variant in VARIANTS]
    variants = itertools.cycle(reversed(VARIANTS))
    return [(layout, next(variants)) for layout in layouts if layout not in ONLY_IN_FULL]


def logprobs(model, sample):
    tokens = torch.tensor([sample.prompt_ids + sample.response_ids])
    first = len(sample.prompt_ids)
    logits = model(tokens).logits[0, first - 1 : -1]
    return logits.log_softmax(-1).gather(-1, tokens[0, first:, None])[:, 0]


def routed_logprobs(model, sample):
    """The same, with each token sent to the experts that the sample names."""
    tokens = len(sample.prompt_ids) + len(sample.response_ids)
    named = np.frombuffer(sample.routed_experts, EXPERTS_DTYPE).astype(np.int64)
    named_tLK = torch.from_numpy(named).view(tokens - 1, LAYERS, PER_TOKEN)
    for number, layer in enumerate(model.model.layers):
        # Nothing is read behind the last token, which may go anywhere.
        chosen_TK = torch.cat([named_tLK[:, number], named_tLK[:1, number]])

        def forward(gate, hidden, chosen_TK=chosen_TK):
            scores = torch.nn.functional.linear(hidden.view(-1, hidden.shape[-1]), gate.weight)
            return scores, scores.gather(1, chosen_TK).softmax(-1), chosen_TK

        layer.mlp.gate.forward = MethodType(forward, layer.mlp.gate)
    return logprobs(model, sample)


def name_experts(samples):
    """Each token of each layer goes to experts drawn at random, whatever its router says."""
    draw = np.random.default_rng(len(samples))
    return [
        replace(
            s,
            routed_experts=draw.permuted(
                np.tile(
                    np.arange(4),
                    (len(s.prompt_ids) + len(s.response_ids) - 1, LAYERS, 1),
                ),
                axis=2,
            )[:, :, :PER_TOKEN]
            .astype(EXPERTS_DTYPE)
            .tobytes(),
        )
        for s in samples
    ]


class Expected:
    """What transformers and torch's AdamW make of the batches of five steps, in float64.

    Its own rounding is then nothing, and a gap to it is all ours.
    """

    def __init__(self, path, folder, make_samples, logprobs=logprobs):
        model = AutoModelForCausalLM.from_pretrained(
            path, dtype=torch.float64, experts_implementation="eager"
        )
        adamw = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
        self.losses = []
        for step in range(STEPS):
            loss = -torch.cat([logprobs(model, s) for s in make_samples(step)]).mean()
            adamw.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            adamw.step()
            self.losses.append(loss.item())
        model.save_pretrained(folder)
        self.weights = load_file(folder / "model.safetensors")


@pytest.fixture(scope="module")
def dense(make_model, make_samples, tmp_path_factory):
    path = make_model("qwen3", tie_word_embeddings=True)
    return path, Expected(path, tmp_path_factory.mktemp("after"), make_samples)


@pytest.fixture(scope="module")
def experts(make_model, make_samples, tmp_path_factory):
    path = make_model("qwen3_moe")
    return path, Expected(path, tmp_path_factory.mktemp("after"), make_samples)


@pytest.fixture(scope="module")
def routed(experts, make_samples, tmp_path_factory):
    def make(step):
        return name_experts(make_samples(step))

    folder = tmp_path_factory.mktemp("after")
    return experts[0], Expected(experts[0], folder, make, routed_logprobs), make


def train(many_ranks, run, model, world_size, megatron, fault=None, make_routed=None):
    """(losses, weights, number of different weights among the ranks) of five steps."""
    trainer = TrainerConfig(max_tokens_per_micro_batch=48, step_timeout_s=300)
    changes = {
        "model": ModelConfig(path=str(model)),
        "algorithm": SftConfig(),
        "trainer": trainer.model_copy(update={"router_replay": make_routed is not None}),
        "megatron": {"lr": 1e-3, "weight_decay": 0.0, "clip_grad": 1.0, **megatron},
    }
    with many_ranks(world_size, **changes) as ranks:
        if fault:
            ranks.call("break", fault)
        results = [
            ranks.call("train", run.commit(step, make_routed and make_routed(step)))
            for step in range(STEPS)
        ]
        weights = ranks.call("do", "weights")[0]
        if fault:
            ranks.call("mend")
    digests = {r.weights_digest for r in results[-1]}
    return [r[0].metrics["train/loss"] for r in results], weights, len(digests)


def gaps(expected, losses, weights):
    """(largest loss gap, median weight gap, largest weight gap)."""
    assert weights.keys() == expected.weights.keys()
    gap = torch.cat(
        [
            (torch.from_numpy(weights[name]) - expected.weights[name]).abs().flatten()
            for name in weights
        ]
    )
    loss = max(abs(a - b) for a, b in zip(losses, expected.losses, strict=True))
    return loss, gap.median().item(), gap.max().item()


def check(many_ranks, run, model, layout, variant):
    path, expected, *make_routed = model
    world_size, megatron = layout
    megatron = {**megatron, **VARIANTS[variant]}
    losses, weights, digests = train(
        many_ranks, run, path, world_size, megatron, None, *make_routed
    )
    loss, median, largest = gaps(expected, losses, weights)
    print(f"loss {loss:.1e}, weights median {median:.1e} max {largest:.1e}")
    assert digests == 1
    assert loss <= LOSS
    assert median <= WEIGHTS
    assert largest <= LARGEST


@pytest.mark.parametrize(("layout", "variant"), chosen(LAYOUTS))
def test_five_steps_equal_transformers(many_ranks, run, dense, layout, variant):
    check(many_ranks, run, dense, LAYOUTS[layout], variant)


@pytest.mark.parametrize(("layout", "variant"), chosen(EXPERTS))
def test_five_steps_of_a_mixture_of_experts_equal_transformers(
    many_ranks, run, experts, layout, variant
):
    check(many_ranks, run, experts, EXPERTS[layout], variant)


@pytest.mark.parametrize(("layout", "variant"), chosen(REPLAYED))
def test_five_steps_along_the_servers_experts_equal_transformers(
    many_ranks, run, routed, layout, variant
):
    check(many_ranks, run, routed, REPLAYED[layout], variant)


@pytest.mark.parametrize(
    ("fault", "megatron"),
    [
        ("no_finalize", {}),
        ("no_finalize", SP),
        ("no_tensor_parallel_reduce", TP2),
        ("shifted_labels", PP2),
    ],
)
def test_a_fault_in_the_parallel_step_is_noticed(many_ranks, run, dense, fault, megatron):
    path, expected = dense
    losses, weights, digests = train(many_ranks, run, path, 2, megatron, fault)
    loss, _, largest = gaps(expected, losses, weights)
    print(f"{fault}: loss {loss:.1e}, weights max {largest:.1e}, digests {digests}")
    assert loss > 100 * LOSS
    assert largest > 10 * LARGEST
