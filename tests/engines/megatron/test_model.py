"""The model is the one that transformers computes, and its weights leave as they came."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from rollflow.engines import meeting
from rollflow.engines.config import ModelConfig
from rollflow.engines.cpu.megatron import cuda_means_cpu
from rollflow.engines.megatron import parallel
from rollflow.engines.megatron.attention import pack
from rollflow.engines.megatron.export import _gathered_weights, export_weights
from rollflow.engines.megatron.fused_layer import after_attention, before_attention, fuse_layers
from rollflow.engines.megatron.model import build_model
from rollflow.engines.megatron.settings import split_settings

LENGTHS = [3, 17, 5, 1, 16, 30, 40]
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


@pytest.fixture
def build():
    settings = split_settings({})
    parallel.join(meeting.open_store("127.0.0.1"), 0, 1, backend="gloo", timeout_s=60)

    def make(path, seed=1, **config):
        parallel.parallel_state.destroy_model_parallel()
        parallel.make_groups(settings, seed, timeout_s=60)
        return build_model(ModelConfig(path=str(path), **config), settings, "cpu")

    parallel.make_groups(settings, 1, timeout_s=60)
    yield make
    parallel.leave()


def logits_of(model, sequences):
    packed = pack([len(s) for s in sequences])
    with torch.no_grad(), cuda_means_cpu():
        return model.chunks[0](
            input_ids=torch.cat(sequences)[None],
            position_ids=packed.positions_T[None],
            attention_mask=None,
            packed_seq_params=packed,
        )[0]


def logits_and_gradients(model, sequences):
    packed = pack([len(s) for s in sequences])
    [chunk] = model.chunks
    chunk.zero_grad_buffer()
    with cuda_means_cpu():
        logits = chunk(
            input_ids=torch.cat(sequences)[None],
            position_ids=packed.positions_T[None],
            attention_mask=None,
            packed_seq_params=packed,
        )[0]
        logits.log_softmax(-1)[:, 3].sum().backward()
    return logits.detach(), {n: p.main_grad.clone() for n, p in chunk.named_parameters()}


@pytest.mark.parametrize(
    ("family", "config"),
    [
        ("qwen3", {}),
        ("qwen3", {"tie_word_embeddings": True}),
        ("qwen3", {"num_key_value_heads": 4, "rope_theta": 1e6}),
        ("qwen2", {}),
        ("llama", {}),
        ("llama", {"rope_parameters": LLAMA3}),
        ("glm4", {}),
        ("qwen3_moe", {}),
        ("qwen3_moe", {"norm_topk_prob": False, "mlp_only_layers": [0]}),
    ],
)
def test_packed_logprobs_equal_transformers_and_weights_leave_as_they_came(
    build, make_model, family, config
):
    path = make_model(family, **config)
    model = build(path)
    sequences = [torch.randint(0, 24, (n,)) for n in LENGTHS]
    reference = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    with torch.no_grad():
        expected = torch.cat([reference(s[None]).logits[0] for s in sequences])
    found = logits_of(model, sequences)
    assert (found.log_softmax(-1) - expected.log_softmax(-1)).abs().max() < 1e-5

    exported = dict(export_weights(model))
    own = load_file(path / "model.safetensors")
    assert exported.keys() == own.keys()
    assert all(torch.equal(exported[name], own[name]) for name in own)


@pytest.mark.parametrize(
    ("family", "config", "fused"),
    [
        ("qwen3", {}, 2),
        ("qwen3", {"num_key_value_heads": 4}, 2),
        ("qwen2", {}, 2),
        ("llama", {}, 2),
        ("qwen3_moe", {"mlp_only_layers": [0]}, 1),
        ("glm4", {}, 0),
    ],
)
def test_a_layer_in_two_functions_computes_what_its_modules_do(
    build, make_model, family, config, fused
):
    model = build(make_model(family, **config))
    sequences = [torch.randint(0, 24, (n,)) for n in LENGTHS]
    expected, gradients = logits_and_gradients(model, sequences)
    assert fuse_layers(model.chunks, (before_attention, after_attention)) == fused
    found, others = logits_and_gradients(model, sequences)
    assert (found - expected).abs().max() < 1e-5
    assert gradients.keys() == others.keys()
    for name, gradient in gradients.items():
        assert (others[name] - gradient).norm() <= 1e-5 * gradient.norm(), name


def test_a_rank_that_holds_all_exports_what_mbridge_does(build, make_model):
    for family in ("qwen3", "qwen2", "glm4", "qwen3_moe"):
        model = build(make_model(family))
        with cuda_means_cpu():
            expected = dict(_gathered_weights(model))
        found = dict(export_weights(model))
        assert [*found] == [*expected]
        assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_tied_model_does_not_change_how_a_later_untied_one_is_mapped(build, make_model):
    build(make_model("qwen3", tie_word_embeddings=True))
    untied = build(make_model("qwen3"))
    assert "lm_head.weight" in dict(export_weights(untied))


def test_random_weights_follow_from_the_seed(build, model_path):
    first, again, other = (
        dict(export_weights(build(model_path, seed=seed, random_weights=True)))
        for seed in (1, 1, 2)
    )
    name = "model.layers.1.mlp.up_proj.weight"
    assert torch.equal(first[name], again[name])
    assert not torch.equal(first[name], other[name])
    assert 0.08 < first[name].std() < 0.12  # initializer_range


def test_an_unknown_architecture_is_refused_with_those_that_work(build, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    with pytest.raises(ValueError, match=r"'gpt2'.*llama, qwen2, qwen3"):
        build(tmp_path)


def test_a_rotary_scaling_that_megatron_lacks_is_refused(build, make_model):
    other = LLAMA3 | {"original_max_position_embeddings": 64}
    with pytest.raises(ValueError, match="original_max_position_embeddings"):
        build(make_model("llama", rope_parameters=other))


def test_a_folder_without_config_is_named(build, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"model\.path"):
        build(tmp_path)
