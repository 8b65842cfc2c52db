"""Two ranks on gloo are one trainer."""

import pytest
import torch
from safetensors.torch import load_file

from rollflow.engines.algorithms.config import GrpoConfig
from rollflow.engines.megatron.config import TrainerConfig
from rollflow.storage.checkpoints import files_folder

SAME = ("train/loss", "train/grad_norm", "train/entropy", "train/kl", "train/tokens", "mismatch/kl")


def weights_of(run, checkpoint):
    return load_file(f"{files_folder(run.store, checkpoint)}/hf/model.safetensors")


def test_two_ranks_train_as_one_and_their_checkpoint_continues_on_one(one_rank, many_ranks, run):
    changes = {
        "algorithm": GrpoConfig(reduction="sequence", kl_coef=0.01, entropy_coef=0.01),
        "trainer": TrainerConfig(max_tokens_per_micro_batch=32, step_timeout_s=120),
    }
    batches = [run.commit(step) for step in range(3)]
    with many_ranks(2, **changes) as ranks:
        pairs = [ranks.call("train", batch) for batch in batches[:2]]
        assert all(a.weights_digest == b.weights_digest for a, b in pairs)
        assert all(
            {k: v for k, v in a.metrics.items() if not k.startswith("perf/")}
            == {k: v for k, v in b.metrics.items() if not k.startswith("perf/")}
            for a, b in pairs
        )
        saved, same = ranks.call("save", 1)
        assert saved == same
        third, _ = ranks.call("train", batches[2])

    with one_rank(**changes) as rank:
        for batch, (pair, _) in zip(batches, pairs, strict=False):
            alone = rank.train(batch)
            for name in SAME:
                assert alone.metrics[name] == pytest.approx(pair.metrics[name], abs=1e-5)
        assert rank.restore(saved) == 2
        resumed = rank.train(batches[2])
    assert resumed.metrics["train/grad_norm"] == pytest.approx(
        third.metrics["train/grad_norm"], abs=1e-5
    )
    assert all(torch.isfinite(w).all() for w in weights_of(run, saved).values())
