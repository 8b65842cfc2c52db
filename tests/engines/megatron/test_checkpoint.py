"""Training goes on from a checkpoint as if it had never stopped."""

import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM

from rollflow.engines.checksums import weights_digest
from rollflow.engines.megatron import checkpoint as checkpoint_module
from rollflow.engines.megatron.config import TrainerConfig
from rollflow.engines.megatron.optimizer import _fuse
from rollflow.engines.megatron.optimizer_state import MOMENTS, restore_optimizer
from rollflow.storage.checkpoints import files_folder, find_checkpoint
from rollflow.storage.integrity import ManifestError


def test_a_restored_run_goes_on_bit_by_bit(one_rank, run):
    trainer = TrainerConfig(lr_decay_style="cosine", lr_warmup_steps=1, updates_per_batch=2)
    batches = [run.commit(step) for step in range(4)]
    with one_rank(trainer=trainer) as rank:
        for batch in batches[:2]:
            rank.train(batch)
        checkpoint = rank.save(1)
        straight = [rank.train(batch) for batch in batches[2:]]
    with one_rank(trainer=trainer) as rank:
        assert rank.restore(checkpoint) == 2
        resumed = [rank.train(batch) for batch in batches[2:]]
    assert [r.weights_digest for r in resumed] == [r.weights_digest for r in straight]
    assert [r.metrics["train/lr"] for r in resumed] == [r.metrics["train/lr"] for r in straight]


def test_training_goes_on_while_a_checkpoint_is_on_its_way(one_rank, run, monkeypatch):
    batches = [run.commit(step) for step in range(2)]
    may_go = threading.Event()
    store_files = checkpoint_module.store_files

    def slow(*arguments):
        assert may_go.wait(60)
        return store_files(*arguments)

    monkeypatch.setattr(checkpoint_module, "store_files", slow)
    with one_rank() as rank:
        first = rank.train(batches[0])
        assert rank.save(0, hf=False, wait=False) is None
        second = rank.train(batches[1])
        assert find_checkpoint(run.store, run.ref, 0) is None
        may_go.set()
        checkpoint = rank.saved()
        assert checkpoint.weights_digest == first.weights_digest
        assert rank.saved() is None
        assert rank.restore(checkpoint) == 1
        assert rank.train(batches[1]).weights_digest == second.weights_digest


def test_a_checkpoint_that_fails_on_its_way_fails_the_next_call(one_rank, run, monkeypatch):
    def full(*_):
        raise OSError("the disk is full")

    monkeypatch.setattr(checkpoint_module, "store_files", full)
    with one_rank() as rank:
        rank.train(run.commit(0))
        rank.save(0, hf=False, wait=False)
        with pytest.raises(OSError, match="disk is full"):
            rank.saved()
    assert find_checkpoint(run.store, run.ref, 0) is None


def test_a_checkpoint_goes_back_over_a_live_trainer(one_rank, run):
    batches = [run.commit(step) for step in range(2)]
    with one_rank() as rank:
        rank.train(batches[0])
        checkpoint = rank.save(0, hf=False)
        first = rank.train(batches[1])
        assert rank.restore(checkpoint) == 1
        assert rank.train(batches[1]).weights_digest == first.weights_digest


def test_the_hugging_face_folder_holds_the_weights_and_what_stood_beside_them(
    one_rank, run, model_path
):
    with one_rank() as rank:
        result = rank.train(run.commit(0))
        checkpoint = rank.save(0)
        assert rank.save(0) == checkpoint
    folder = Path(files_folder(run.store, checkpoint)) / "hf"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert weights_digest(model.state_dict().items()) == result.weights_digest
    kept = (folder / "generation_config.json").read_bytes()
    assert kept == (model_path / "generation_config.json").read_bytes()


def test_a_damaged_checkpoint_is_not_loaded(one_rank, run):
    with one_rank() as rank:
        rank.train(run.commit(0))
        checkpoint = rank.save(0, hf=False)
        shard = Path(files_folder(run.store, checkpoint)) / "torch_dist" / "__0_0.distcp"
        data = bytearray(shard.read_bytes())
        data[len(data) // 2] ^= 1
        shard.write_bytes(data)
        with pytest.raises(ManifestError, match="__0_0"):
            rank.restore(checkpoint)


def test_only_the_step_that_was_just_trained_can_be_saved(one_rank):
    with one_rank() as rank, pytest.raises(ValueError, match="checkpoint of step 3"):
        rank.save(3)


def test_fused_adam_goes_on_from_what_was_saved_of_it():
    """On a GPU the count of updates stands beside the parameter; a CPU has the fused kernel too."""
    weights = [torch.randn(5, 3) for _ in range(2)]
    gradients = [torch.randn(5, 3) for _ in range(4)]
    found = []
    for stop in (None, 2):
        parameter = torch.nn.Parameter(weights[0].clone())
        inner = torch.optim.AdamW([parameter], lr=0.1)
        one = SimpleNamespace(
            optimizer=inner, is_stub_optimizer=False, config=SimpleNamespace(optimizer="adam")
        )
        _fuse(one)  # pyright: ignore[reportArgumentType]
        assert all(group["fused"] and not group["foreach"] for group in inner.param_groups)
        for number, gradient in enumerate(gradients):
            if number == stop:
                state = {k: v.clone() for k, v in inner.state[parameter].items()}
                loaded = {
                    "step": float(state["step"]),
                    "state": {f"0.{k}": state[k] for k in MOMENTS["adam"]},
                }
                restore_optimizer(one, loaded)
            parameter.grad = gradient.clone()
            inner.step()
        found.append(parameter.detach())
    assert torch.equal(*found)
