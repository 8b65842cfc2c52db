"""Settings: file and command line mean the same, mistakes are named with their fix."""

import subprocess
import sys

import pytest

from rollflow.flows.arguments import build_config, load_config, overlay, recipes
from tests.flows.least import BASE


@pytest.mark.parametrize(
    ("words", "place", "value"),
    [
        (["--rollout.batch-size", "64"], ("rollout", "batch_size"), 64),
        (["--rollout-batch-size=64"], ("rollout", "batch_size"), 64),
        (["--sglang-mem-fraction-static", "0.5"], ("sglang", "mem_fraction_static"), 0.5),
        (["--router-policy", "round_robin"], ("router", "policy"), "round_robin"),
        (["--tensor-model-parallel-size", "2"], ("megatron", "tensor_model_parallel_size"), 2),
        (["--lr", "1e-4"], ("megatron", "lr"), 1e-4),
        (["--algorithm-eps-clip-high", "0.3"], ("algorithm", "eps_clip_high"), 0.3),
        (["--sequence-parallel"], ("megatron", "sequence_parallel"), True),
        (["--data.path", "s3://b/x.jsonl@[0:5]"], ("data", "path"), "s3://b/x.jsonl@[0:5]"),
    ],
)
def test_a_word_on_the_command_line_means_the_same_as_a_key_in_the_file(words, place, value):
    table, key = place
    by_words = build_config(overlay(BASE, words))
    by_file = build_config({**BASE, table: {**BASE.get(table, {}), key: value}})
    assert by_words == by_file


def test_a_dashed_word_reaches_into_the_tables_of_a_table():
    config = build_config(overlay(BASE, ["--rollout-sampling-max-new-tokens", "7"]))
    assert config.rollout.sampling.max_new_tokens == 7


@pytest.mark.parametrize(("word", "name"), [("2026", "2026"), ("'a-b'", "a-b"), ("run.1", "run.1")])
def test_a_name_that_looks_like_a_number_is_a_name(word, name):
    assert build_config(overlay(BASE, ["--name", word])).name == name


def test_values_of_the_stores_options_are_not_shown():
    with pytest.raises(ValueError, match="store.options") as caught:  # noqa: RUF043
        build_config(overlay(BASE, ["--store-options", "hunter2"]))
    assert "hunter2" not in str(caught.value)


def test_the_command_line_does_not_change_the_tree_that_it_is_laid_over():
    overlay(BASE, ["--rollout.batch_size", "64"])
    assert "batch_size" not in BASE["rollout"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["--rollout.bach_size", "3"],
            "rollout.bach_size is not a setting; did you mean 'batch_size'?",
        ),
        (["--rollout-batchsize", "3"], "did you mean 'batch_size'?"),
        (["--algorithm.eps_clp", "1"], "did you mean 'eps_clip'?"),
        (["--algorithm.name", "grop"], "algorithm.name = 'grop' is none; did you mean 'grpo'?"),
        (["--algorithm.name", "xyz"], "known: grpo, dr_grpo"),
        (["--megatron.lr", "abc"], "megatron.lr = 'abc' is no Optional[float]"),
        (["--megatron.moe-token-dispatcher-type", "al"], "is no Literal['allgather', 'alltoall'"),
        (["--sglang-mem-fraction-static", "much"], "sglang.mem_fraction_static = 'much' is no"),
        (["--router-max-concurrent-requests", "1.5"], "max_concurrent_requests = 1.5 is no int"),
        (["--tensor-modl-parallel-size", "2"], "did you mean megatron.tensor_model_parallel_size?"),
        (["--sglang-mem-fraction", "1"], "did you mean sglang.mem_fraction_static?"),
        (["--router-polcy", "x"], "did you mean router.policy?"),
        (["--sglang-model-path", "x"], "sglang.model_path is set by rollflow: use model.path"),
        (["--router-port", "1"], "router.port is set by rollflow"),
        (["--steps", "-1"], "steps = -1"),
        (["--lr", "-1"], "megatron.lr = -1 is below 0"),
        (["--sglang-mem-fraction-static", "1.5"], "sglang.mem_fraction_static = 1.5 is no share"),
        (["--rollout.sampling.top_k", "0"], "rollout.sampling.top_k = 0: give 1 or more, or -1"),
        (["--cluster.address", "127.0.0.1"], "cluster.address = '127.0.0.1': give host:port"),
        (["--gates.mismatch_kl", "-1"], "gates.mismatch_kl = -1"),
        (["--gates.mismatch_kl", "nan"], "gates.mismatch_kl = nan"),
        (["--trainer.updates_per_batch", "3"], "rollout.batch_size = 32"),
        (["--algorithm.name", "distill"], "needs rollout.teacher"),
        (
            ["--rollout.teacher", '{path = "x"}'],
            "rollout.teacher is set but algorithm.name = 'grpo'",
        ),
        (
            [
                *("--algorithm", "distill", "--rollout.teacher", '{path = "x"}'),
                *("--rollout.sampling.temperature", "0.5"),
            ],
            "rollout.sampling.temperature = 0.5 with algorithm.teacher_coef above 0",
        ),
        (
            ["--n-samples-per-prompt", "1"],
            "rollout.n_samples_per_prompt = 1 with algorithm.advantage",
        ),
        (["--rollout-temperature", "0"], "rollout.sampling.temperature = 0: the samples"),
        (
            ["--algorithm", '{name = "ppo", critic = {warmup_steps = 3}}'],
            "algorithm.critic.warmup_steps = 3 of steps = 3",
        ),
        (
            ["--trainer.lr_warmup_steps", "3"],
            "trainer.lr_warmup_steps = 3 is not below the 3 updates",
        ),
        (["--algorithm.kl_type", "k9"], "algorithm.kl_type = 'k9'"),
        (["--algorithm.gamma", "0.9"], "algorithm: gamma = 0.9 has no effect"),
        (["--algorithm", "grop"], "algorithm.name = 'grop' is none; did you mean 'grpo'?"),
        (["--calculate-per-token-loss", "true"], "set by rollflow: use algorithm.reduction"),
        (["--rollout.teacher", "{}"], "path = '' and url = ''; give one of them"),
        (["--stop", '{metric = "eval/x/reward", at_least = 1}'], "stop.metric"),
        (["steps", "3"], "'steps' stands where a --setting is expected"),
        (["--name", "a b"], "name = 'a b'"),
        (["--trainer.lr_decay_style", "WSD"], "trainer.lr_wsd_decay_steps = 0"),
        (["--steps"], "steps has no value"),
        (["--data.path", "--steps", "3"], "data.path has no value"),
    ],
)
def test_a_mistake_is_refused_by_name(words, message):
    with pytest.raises(ValueError) as caught:
        build_config(overlay(BASE, words))
    assert message in str(caught.value)


def test_another_algorithm_has_the_setting_of_its_own_paper():
    words = ["--algorithm.name", "gspo", "--algorithm.entropy_coef", "0.1"]
    config = load_config(recipes()["arithmetic_cpu"], words)
    own = build_config({**BASE, "algorithm": {"name": "gspo", "entropy_coef": 0.1}})
    assert config.algorithm == own.algorithm
    same = load_config(recipes()["arithmetic_cpu"], ["--algorithm.name", "grpo"])
    assert same == load_config(recipes()["arithmetic_cpu"])


def test_every_mistake_is_listed_at_once():
    with pytest.raises(ValueError) as caught:
        build_config(overlay(BASE, ["--steps", "0", "--rollout.seedd", "1"]))
    assert len(str(caught.value).splitlines()) == 2


@pytest.mark.parametrize("name", sorted(recipes()))
def test_every_recipe_is_a_valid_configuration(name):
    assert load_config(recipes()[name]).steps > 0


def test_values_of_types_that_are_not_pythons_own_are_left_to_their_class():
    words = ["--lr", "1", "--adam-beta1", "0.8", "--attention-backend", "local"]
    assert build_config(overlay(BASE, words)).megatron["attention_backend"] == "local"


def test_a_folder_is_no_configuration(tmp_path):
    with pytest.raises(ValueError, match="is a folder; give a TOML file in it"):
        load_config(tmp_path)


def test_a_missing_file_is_named_with_the_nearest_recipe():
    with pytest.raises(ValueError, match=r"did you mean .*arithmetic_cpu\.toml"):
        load_config("aritmetic_cpu.toml")


def test_a_file_that_is_not_toml_is_named(tmp_path):
    (tmp_path / "bad.toml").write_text("steps = = 3")
    with pytest.raises(ValueError, match=r"bad\.toml is not valid TOML.*line 1"):
        load_config(tmp_path / "bad.toml")


@pytest.mark.parametrize(
    "module", ["rollflow.storage", "rollflow.storage.inspect", "rollflow.flows.config"]
)
def test_settings_and_storage_import_without_the_engines_packages(module):
    code = (
        "import sys\n"
        "for name in ('torch', 'ray', 'sglang', 'megatron', 'transformers', 'prefect'):\n"
        "    sys.modules[name] = None\n"
        f"import {module}\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
