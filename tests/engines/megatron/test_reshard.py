"""A checkpoint goes on at any other layout as if the run had never stopped."""

from typing import Any

import numpy as np
import pytest

from rollflow.engines.algorithms.config import SftConfig
from rollflow.engines.config import ModelConfig
from rollflow.engines.megatron.config import TrainerConfig

TP2 = {"tensor_model_parallel_size": 2}
PP2 = {"pipeline_model_parallel_size": 2}
EP2 = {"expert_model_parallel_size": 2}
DISTRIBUTED = {"use_distributed_optimizer": True}
ROUTES: dict[str, tuple[str, tuple[int, dict[str, Any]], tuple[int, dict[str, Any]]]] = {
    "TP1 to TP2": ("qwen3", (1, {}), (2, TP2)),
    "TP2 to PP2, distributed": ("qwen3", (2, {**TP2, **DISTRIBUTED}), (2, {**PP2, **DISTRIBUTED})),
    "DP2 to DP1, distributed": ("qwen3", (2, DISTRIBUTED), (1, DISTRIBUTED)),
    "DP2 distributed to TP2": ("qwen3", (2, DISTRIBUTED), (2, TP2)),
    "EP1 to EP2": ("qwen3_moe", (1, {}), (2, EP2)),
    "EP1 to EP2, distributed": ("qwen3_moe", (2, DISTRIBUTED), (2, {**EP2, **DISTRIBUTED})),
}


@pytest.mark.parametrize("route", ROUTES)
def test_training_goes_on_at_another_layout(many_ranks, run, make_model, route):
    family, saver, loader = ROUTES[route]
    model = make_model(family, tie_word_embeddings=family == "qwen3")
    batches = [run.commit(step) for step in range(4)]
    with many_ranks(saver[0], **_changes(model, saver[1])) as ranks:
        for batch in batches[:2]:
            ranks.call("train", batch)
        checkpoint = ranks.call("save", 1, False)[0]
        straight = [ranks.call("train", batch)[0].metrics for batch in batches[2:]]
        expected = ranks.call("do", "weights")[0]
    with many_ranks(loader[0], **_changes(model, loader[1])) as ranks:
        assert set(ranks.call("restore", checkpoint)) == {2}
        resumed = [ranks.call("train", batch)[0].metrics for batch in batches[2:]]
        found = ranks.call("do", "weights")[0]
    for name in ("train/loss", "train/grad_norm", "train/lr"):
        assert [m[name] for m in resumed] == pytest.approx([m[name] for m in straight], abs=2e-5)
    assert found.keys() == expected.keys()
    gap = np.concatenate([np.abs(found[n] - expected[n]).ravel() for n in expected])
    print(f"{route}: weights median {np.median(gap):.1e} max {gap.max():.1e}")
    assert np.median(gap) < 1e-6
    assert gap.max() < 1e-4


def _changes(model: Any, megatron: dict[str, Any]) -> dict[str, Any]:
    return {
        "model": ModelConfig(path=str(model)),
        "algorithm": SftConfig(),
        "trainer": TrainerConfig(
            max_tokens_per_micro_batch=64, step_timeout_s=300, lr_decay_style="cosine"
        ),
        "megatron": {"lr": 1e-3, "weight_decay": 0.0, **megatron},
    }
