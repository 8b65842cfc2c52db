"""What the GPU's bench decides before and beside measuring; it needs no GPU here."""

from types import SimpleNamespace

import pytest
from rich.console import Console

from rollflow.flows.bench import gpu


async def measured(monkeypatch, memory_gib, parts, *only):
    monkeypatch.setattr(gpu, "gpu_name", lambda: "a card")
    monkeypatch.setattr(gpu, "gpu_memory_gib", lambda: memory_gib)
    monkeypatch.setattr(gpu, "hbm_bytes_per_s", lambda: 1e12)
    monkeypatch.setattr(gpu, "PARTS", parts)
    return await gpu.measure(Console(quiet=True), ("0.6b", "4b"), gpu.Size(parts=only))


async def speed(shape, size):
    return {"sync_ms": 1.0}


async def broken(shape, size):
    raise RuntimeError("a gate")


async def test_a_shape_that_does_not_fit_is_refused_by_name(monkeypatch):
    facts = await measured(monkeypatch, 80.0, (("a part", 1, speed),))
    assert facts["4b"] == {"refused": "needs about 91 GiB, the GPU has 80"}


async def test_a_part_that_fails_is_named_and_the_others_are_measured(monkeypatch):
    parts = (("training alone", 1, broken), ("a part", 1, speed))
    facts = await measured(monkeypatch, 80.0, parts)
    assert facts["0.6b"]["failed"] == {"training alone": "a gate"}
    assert facts["0.6b"]["sync_ms"] == 1.0


async def test_only_the_parts_that_are_asked_for_are_measured(monkeypatch):
    parts = (("training alone", 1, broken), ("whole iterations", 1, speed))
    facts = await measured(monkeypatch, 80.0, parts, "whole iterations")
    assert facts["0.6b"] == {"trl_iteration_s": None, "sync_ms": 1.0}
    with pytest.raises(ValueError, match="no such part; there are training alone; whole"):
        gpu.Size(parts=["iterations"])


def test_longer_answers_are_packed_fewer_to_a_micro_batch_of_the_same_tokens(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(gpu, "gpu_memory_gib", lambda: 140.0)
    usual, long = gpu._config("0.6b"), gpu._config("0.6b", new_tokens=2048)
    assert usual.rollout.sampling.max_new_tokens == 512
    assert long.rollout.sampling.max_new_tokens == 2048
    budgets = [config.trainer.max_tokens_per_micro_batch for config in (usual, long)]
    assert budgets == [64 * 518] * 2
    assert long.sglang["max_total_tokens"] == 256 * (64 + 2048) + 4096


def test_the_weights_of_a_shape_s_folder_are_taken_where_it_has_some(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(gpu, "gpu_memory_gib", lambda: 140.0)
    assert gpu._config("0.6b").model.random_weights
    (tmp_path / ".rollflow/throughput/0.6b/model/model.safetensors").touch()
    assert not gpu._config("0.6b").model.random_weights


def test_shapes_have_the_sizes_of_their_names():
    assert 0.59e9 < gpu.parameters("0.6b") < 0.61e9
    assert 1.7e9 < gpu.parameters("1.7b") < 1.73e9
    assert 4.0e9 < gpu.parameters("4b") < 4.1e9


async def test_pushes_from_one_gpu_to_another_need_two(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(gpu, "gpu_memory_gib", lambda: 140.0)
    monkeypatch.setattr(gpu, "link_bytes_per_s", lambda: 400e9)
    parts = {"broadcast": 0.005, "": 0.010, "pause": 0.020}
    perf = {f"perf/sync_{name}_s".replace("__", "_"): s for name, s in parts.items()}
    perf |= {f"perf/sync_{name}_s": 0.0 for name in gpu.SPLIT_PARTS if name not in parts}
    ran = []

    async def train(config):
        ran.append(config)
        return SimpleNamespace(perf=[perf] * config.steps)

    monkeypatch.setattr(gpu, "train", train)
    monkeypatch.setattr(gpu, "gpu_count", lambda: 1)
    assert "skipped" in (await gpu._split("0.6b", gpu.Size()))["split"]
    assert not ran
    monkeypatch.setattr(gpu, "gpu_count", lambda: 2)
    found = (await gpu._split("0.6b", gpu.Size(steps=5)))["split"]
    [config] = ran
    assert (config.cluster.colocate, config.steps, found["pushes"]) == (False, 5, 2)
    assert found["sync_ms"] == pytest.approx(10)
    assert found["broadcast_gb_s"] == pytest.approx(2 * gpu.parameters("0.6b") / 0.005 / 1e9)
    assert found["broadcast_fraction_of_link"] == pytest.approx(found["broadcast_gb_s"] / 400)
