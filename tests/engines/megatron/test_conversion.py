"""Checkpoints change their format and nothing else."""

import json
import pickle
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from rollflow.engines import meeting
from rollflow.engines.algorithms.config import GrpoConfig
from rollflow.engines.config import ModelConfig
from rollflow.engines.conversion.config import ConvertConfig
from rollflow.engines.conversion.convert import convert
from rollflow.engines.megatron.config import TrainerConfig
from rollflow.storage.config import StoreConfig
from rollflow.storage.integrity import ManifestError
from rollflow.storage.objects import Store
from tests.object_stores import BUCKET, ENVIRONMENT, ObjectStoreServer, install

FAMILIES = {
    "qwen2": {},
    "qwen3": {"tie_word_embeddings": True},
    "llama": {},
    "glm4": {},
    "qwen3_moe": {"mlp_only_layers": [0]},
}
TP2_PP2 = {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}
KILLED_AT_PART_2 = """
import os, signal, sys
from rollflow.engines.conversion.config import ConvertConfig
from rollflow.engines.conversion.convert import convert
from rollflow.storage.objects import Store
put = Store.put_file
def put_file(self, path, source):
    if "__2_" in path or "00003-of" in path:
        os.kill(os.getpid(), signal.SIGKILL)
    return put(self, path, source)
Store.put_file = put_file
convert(ConvertConfig.model_validate_json(sys.argv[1]))
"""


def tensors_in(folder):
    return {n: t for file in Path(folder).glob("*.safetensors") for n, t in load_file(file).items()}


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_way_there_and_back_is_exact_and_needs_nothing_else(make_model, tmp_path, family):
    path = make_model(family, **FAMILIES[family])
    there = ConvertConfig(
        source=str(path), target=str(tmp_path / "dist"), part_bytes=50_000, verify=True
    )
    back = ConvertConfig(
        source=str(tmp_path / "dist"),
        target=f"file://{tmp_path}/hf",
        shard_bytes=90_000,
        verify=True,
    )
    first, second = convert(there), convert(back)
    assert first.tensors == second.tensors == first.verified == second.verified
    assert (first.kind, second.kind) == ("torch_dist", "huggingface")
    assert len(list((tmp_path / "hf").glob("model-*.safetensors"))) > 1
    assert_equal(tensors_in(tmp_path / "hf"), tensors_in(path))
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert config == json.loads((path / "config.json").read_text())


@pytest.fixture
def bucket(tmp_path, monkeypatch):
    install()
    server = ObjectStoreServer("rclone", tmp_path / "objects")
    for name, value in {**ENVIRONMENT, "AWS_ENDPOINT_URL": server.endpoint}.items():
        monkeypatch.setenv(name, value)
    server.start()
    yield f"s3://{BUCKET}"
    server.kill()


def test_the_way_there_and_back_is_exact_on_an_object_store(make_model, bucket, tmp_path):
    path = make_model()
    there = ConvertConfig(source=str(path), target=f"{bucket}/dist", part_bytes=50_000, verify=True)
    back = ConvertConfig(source=there.target, target=f"{bucket}/hf", verify=True)
    assert convert(there).verified == convert(back).verified > 0
    store = Store(StoreConfig(url=back.target))
    for name in store.children():
        store.get_file(name, tmp_path / "back" / name)
    assert_equal(tensors_in(tmp_path / "back"), tensors_in(path))


def test_a_complete_conversion_is_left_as_it_is(make_model, tmp_path):
    config = ConvertConfig(source=str(make_model()), target=str(tmp_path / "dist"))
    convert(config)
    before = {f: f.stat().st_mtime_ns for f in (tmp_path / "dist").rglob("*")}
    convert(config)
    assert {f: f.stat().st_mtime_ns for f in (tmp_path / "dist").rglob("*")} == before
    other = ConvertConfig(source=str(make_model("llama")), target=str(tmp_path / "dist"))
    with pytest.raises(ValueError, match="conversion of another checkpoint"):
        convert(other)


def test_a_conversion_that_was_killed_goes_on_where_it_stopped(make_model, tmp_path):
    path = make_model()
    there = ConvertConfig(source=str(path), target=str(tmp_path / "dist"), part_bytes=50_000)
    back = ConvertConfig(
        source=str(tmp_path / "dist"), target=str(tmp_path / "hf"), shard_bytes=60_000
    )
    for config in (there, back):
        command = [sys.executable, "-W", "ignore", "-c", KILLED_AT_PART_2, config.model_dump_json()]
        killed = subprocess.run(command, capture_output=True, timeout=120)
        assert killed.returncode == -signal.SIGKILL, killed.stderr[-500:]
        assert not (Path(config.target) / "manifest.json").exists()
        done = convert(config.model_copy(update={"verify": True}))
        assert done.resumed_parts == 2
        assert done.verified == done.tensors
    assert_equal(tensors_in(tmp_path / "hf"), tensors_in(path))


def test_a_configuration_of_other_weights_is_refused_by_tensor_and_both_shapes(
    make_model, tmp_path
):
    wrong = tmp_path / "wrong"
    shutil.copytree(make_model(), wrong)
    config = json.loads((wrong / "config.json").read_text())
    (wrong / "config.json").write_text(json.dumps({**config, "intermediate_size": 80}))
    words = r"layers\.0\.mlp\.gate_proj\.weight has shape \[96, 64\].*asks for \[80, 64\]"
    with pytest.raises(ValueError, match=words):
        convert(ConvertConfig(source=str(wrong), target=str(tmp_path / "dist")))
    assert not (tmp_path / "dist").exists()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"tie_word_embeddings": False}, "lm_head.weight is missing"),
        (
            {"num_hidden_layers": 1, "layer_types": ["full_attention"]},
            r"model\.layers\.1\..*belongs to no parameter",
        ),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}}, "'yarn'"),
    ],
)
def test_what_the_weights_do_not_bear_out_is_refused(make_model, tmp_path, change, words):
    wrong = tmp_path / "wrong"
    shutil.copytree(make_model("qwen3", tie_word_embeddings=True), wrong)
    config = json.loads((wrong / "config.json").read_text())
    (wrong / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(ValueError, match=words):
        convert(ConvertConfig(source=str(wrong), target=str(tmp_path / "dist")))


def test_a_damaged_result_is_found(make_model, tmp_path):
    config = ConvertConfig(source=str(make_model()), target=str(tmp_path / "dist"), verify=True)
    convert(config)
    part = next((tmp_path / "dist" / "release").glob("*.distcp"))
    data = bytearray(part.read_bytes())
    data[len(data) // 2] ^= 1
    part.write_bytes(data)
    with pytest.raises((ValueError, RuntimeError)):
        convert(config)
    manifest = tmp_path / "dist" / "manifest.json"
    manifest.write_bytes(manifest.read_bytes().replace(b"torch_dist", b"torch_disc"))
    with pytest.raises(ManifestError):
        convert(config)


class Evil:
    def __reduce__(self):
        return exec, ("print('this must not run')",)


def test_an_index_with_foreign_code_is_not_read(make_model, tmp_path, capsys):
    convert(ConvertConfig(source=str(make_model()), target=str(tmp_path / "dist")))
    (tmp_path / "dist/release/.metadata").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(ValueError, match=r"builtins\.exec"):
        convert(ConvertConfig(source=str(tmp_path / "dist"), target=str(tmp_path / "hf")))
    assert "must not run" not in capsys.readouterr().out


def test_a_checkpoint_of_two_by_two_ranks_becomes_hugging_face(
    many_ranks, run, make_model, tmp_path
):
    with many_ranks(4, megatron={"lr": 1e-3, **TP2_PP2}) as ranks:
        ranks.call("train", run.commit(0))
        checkpoint = ranks.call("save", 0, False)[0]
        weights = ranks.call("do", "weights")[0]
        done = convert(
            ConvertConfig(source=checkpoint.url, target=str(tmp_path / "hf"), verify=True)
        )
    assert done.verified == len(weights)
    assert_equal(tensors_in(tmp_path / "hf"), {n: torch.from_numpy(w) for n, w in weights.items()})


def test_ranks_export_any_checkpoint_by_the_exporter_of_the_weight_sync(
    many_ranks, run, model_path, processes, tmp_path
):
    convert(ConvertConfig(source=str(model_path), target=str(tmp_path / "dist")))
    two = {"tensor_model_parallel_size": 2}
    with many_ranks(2, megatron={"lr": 1e-3, **two}) as ranks:
        ranks.call("do", "save_legacy", str(tmp_path / "legacy"))

    def export(source, target, megatron, world_size):
        store = meeting.open_store("127.0.0.1")
        config = ConvertConfig(source=str(source), target=str(target), model=str(model_path))
        master = f"127.0.0.1:{store.port}"
        ranks.each("export", [(config, megatron, master, n, world_size) for n in range(world_size)])

    export(tmp_path / "legacy", tmp_path / "from_legacy", two, 2)
    export(tmp_path / "dist", tmp_path / "from_dist", {"pipeline_model_parallel_size": 2}, 2)
    for folder in ("from_legacy", "from_dist"):
        assert_equal(tensors_in(tmp_path / folder), tensors_in(model_path))


def test_a_run_starts_from_one_checkpoint_and_refers_to_another(
    one_rank, run, make_model, tmp_path
):
    first, other = make_model(), make_model(initializer_range=0.05)
    dist = str(tmp_path / "dist")
    convert(ConvertConfig(source=str(other), target=dist))
    with one_rank(model=ModelConfig(path=str(other))) as rank:
        digest = rank._rank_live.digest()
    kl, batch = GrpoConfig(kl_coef=0.1), run.commit(0)
    with one_rank(trainer=TrainerConfig(load=dist)) as rank:
        assert rank._rank_live.digest() == digest
    with one_rank(trainer=TrainerConfig(ref_load=dist), algorithm=kl) as rank:
        assert rank._rank_live.digest() == digest
        assert rank.train(batch).metrics["train/kl"] == 0
    with one_rank(trainer=TrainerConfig(ref_load=dist, load=str(first)), algorithm=kl) as rank:
        assert rank._rank_live.digest() != digest
        assert rank.train(batch).metrics["train/kl"] > 0
