"""Every setting can be looked up, and the arguments of a slime script become a file that loads."""

import tomllib
from pathlib import Path

import pytest

from rollflow.flows import settings_reference
from rollflow.flows.arguments import build_config
from rollflow.flows.from_slime import from_slime, to_toml
from rollflow.flows.settings_reference import diff, entries, explain, page, schema

GRPO = """--advantage-estimator grpo --use-kl-loss --kl-loss-coef 0.00 --kl-loss-type low_var_kl
--entropy-coef 0.00 --eps-clip 0.2 --eps-clip-high 0.28"""
ADAM = """--optimizer adam --lr 1e-6 --lr-decay-style constant --weight-decay 0.1 --adam-beta1 0.9
--adam-beta2 0.98"""
MISC = """--attention-dropout 0.0 --hidden-dropout 0.0 --accumulate-allreduce-grads-in-fp32
--attention-softmax-in-fp32 --attention-backend flash"""
DATA = """--prompt-data /data/dapo-math-17k.jsonl --input-key prompt --label-key label
--apply-chat-template --rollout-shuffle --rm-type deepscaler --num-rollout 3000
--rollout-batch-size 32 --n-samples-per-prompt 8 --rollout-max-response-len 8192
--rollout-temperature 1 --global-batch-size 256 --balance-data"""
EVAL = """--eval-interval 20 --eval-prompt-data aime /data/aime-2024.jsonl
--n-samples-per-eval-prompt 16 --eval-max-response-len 16384 --eval-top-p 1"""
PARALLEL = """--tensor-model-parallel-size 2 --sequence-parallel --pipeline-model-parallel-size 1
--expert-model-parallel-size 1 --expert-tensor-parallel-size 1 --recompute-granularity full
--recompute-method uniform --recompute-num-layers 1 --use-dynamic-batch-size"""
QWEN3_4B = f"""--actor-num-nodes 1 --actor-num-gpus-per-node 8 --colocate --swiglu --num-layers 36
--hidden-size 2560 --ffn-hidden-size 9728 --num-attention-heads 32 --group-query-attention
--num-query-groups 8 --use-rotary-position-embeddings --disable-bias-linear --normalization RMSNorm
--norm-epsilon 1e-6 --rotary-base 1000000 --vocab-size 151936 --kv-channels 128 --qk-layernorm
--hf-checkpoint /models/Qwen3-4B --ref-load /models/Qwen3-4B_torch_dist --load /runs/Qwen3-4B
--save /runs/Qwen3-4B --save-interval 20 {DATA} {EVAL} {PARALLEL} --context-parallel-size 1
--max-tokens-per-gpu 9216 {GRPO} {ADAM} --rollout-num-gpus-per-engine 2
--sglang-mem-fraction-static 0.7 {MISC}""".split()
GLM4_9B = f"""--actor-num-nodes 1 --actor-num-gpus-per-node 4 --rollout-num-gpus 4 --swiglu
--num-layers 40 --hidden-size 4096 --ffn-hidden-size 13696 --num-attention-heads 32
--group-query-attention --num-query-groups 2 --max-position-embeddings 32768 --normalization RMSNorm
--add-qkv-bias --disable-bias-linear --post-self-attn-layernorm --post-mlp-layernorm
--use-rotary-position-embeddings --untie-embeddings-and-output-weights --rotary-percent 0.5
--rotary-interleaved --no-rope-fusion --vocab-size 151552 --hf-checkpoint /models/GLM-Z1-9B-0414
--save-interval 20 {DATA} {EVAL} {PARALLEL} --context-parallel-size 2 --max-tokens-per-gpu 4608
{GRPO} {ADAM} --rollout-num-gpus-per-engine 2 {MISC}""".split()


@pytest.mark.parametrize(
    ("words", "ranks", "servers", "context"), [(QWEN3_4B, 8, 4, 1), (GLM4_9B, 4, 2, 2)]
)
def test_a_slime_script_becomes_a_file_that_loads(words, ranks, servers, context):
    found = from_slime(words)
    config = build_config(tomllib.loads(to_toml(found.tree)))
    assert (config.trainer.ranks, config.rollout.servers) == (ranks, servers)
    assert config.megatron["tensor_model_parallel_size"] == 2
    assert config.megatron["sequence_parallel"] is True
    assert config.megatron["context_parallel_size"] == context
    assert config.sglang["tp_size"] == 2
    assert config.trainer.updates_per_batch == 1
    assert (config.steps, config.checkpoint.every) == (3000, 20)
    assert (config.algorithm.name, found.tree["algorithm"]["eps_clip_high"]) == ("grpo", 0.28)
    assert config.megatron["adam_beta2"] == 0.98
    [aime] = config.evals
    assert (aime.n_samples_per_prompt, aime.sampling.max_new_tokens) == (16, 16384)
    assert found.missing.keys() <= {"colocate", "rm-type"}


def test_what_slime_alone_has_is_listed_and_every_word_is_accounted_for():
    words = [*GLM4_9B, "--use-wandb", "--num-epoch", "3"]
    found = from_slime(words)
    assert {"use-wandb", "num-epoch"} <= found.missing.keys()
    assert "hidden-size" in found.implied
    assert found.implied["hidden-size"] == "use model.path (its config.json)"


@pytest.mark.parametrize(
    ("name", "dotted"),
    [
        ("trainer.ranks", "trainer.ranks"),
        ("--trainer-ranks", "trainer.ranks"),
        ("--tensor-model-parallel-size", "megatron.tensor_model_parallel_size"),
        ("sglang-mem-fraction-static", "sglang.mem_fraction_static"),
        ("router.policy", "router.policy"),
        ("mem_fraction_static", "sglang.mem_fraction_static"),
    ],
)
def test_a_setting_is_found_by_any_of_its_names(name, dotted):
    entry = explain(name)
    assert entry.name == dotted
    assert entry.type


def test_what_rollflow_owns_is_explained_with_the_right_setting():
    assert "model.dtype" in explain("megatron.bf16").owned
    with pytest.raises(ValueError, match=r"did you mean trainer\.ranks"):
        explain("trainer.rank")


def test_every_setting_of_ours_is_on_its_page_and_every_class_has_one():
    ours = page("rollflow")
    assert all(f"`{name}`" in ours for name, e in entries().items() if name.startswith("trainer"))
    assert "| `tensor_model_parallel_size` | `int` | `1` |" in page("megatron")
    assert "cannot be set: servers listen on loopback" in page("sglang")
    assert "`policy`" in page("router")


def test_the_page_of_our_settings_is_that_of_the_code_as_it_is():
    written = Path(settings_reference.__file__).parent / "reference/rollflow.md"
    assert written.read_text() == page("rollflow"), "write it by `make reference`"


def test_the_schema_knows_the_names_that_are_passed_on():
    tree = schema()["properties"]
    assert "tensor_model_parallel_size" in tree["megatron"]["properties"]
    assert "hidden_size" not in tree["megatron"]["properties"]
    assert tree["sglang"]["additionalProperties"] is False


def test_a_difference_is_named_with_both_values():
    a = {"steps": 3, "megatron": {"lr": 1e-3}, "same": {"x": 1}}
    b = {"steps": 3, "megatron": {"lr": 1e-4, "clip_grad": 1.0}, "same": {"x": 1}}
    assert diff(a, b) == [("megatron.clip_grad", "-", "1.0"), ("megatron.lr", "0.001", "0.0001")]
