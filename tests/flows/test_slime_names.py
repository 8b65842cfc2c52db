"""slime's flags on our command line: each lands on its field, and nowhere else."""

import tomllib
from typing import Any

import pytest

from rollflow.engines.rollout.config import RolloutConfig
from rollflow.flows.arguments import build_config, overlay
from rollflow.flows.cli_config import translate
from rollflow.flows.config import SLIME_NAMES, RunConfig
from rollflow.flows.from_slime import from_slime, to_toml
from tests.flows.least import BASE

CUT = ["--over-sampling-batch-size", "64", "--rollout-max-staleness", "1"]
"""What early stop needs beside it."""
FLAGS: dict[str, tuple[list[str], str, Any]] = {
    "custom_rm_path": (["my.rm:score"], "rollout.reward", "my.rm:score"),
    "custom_generate_function_path": (["my.gen.fn"], "rollout.generate", "my.gen.fn"),
    "dynamic_sampling_filter_path": (["my.f:fn"], "hooks.dynamic_filter", "my.f:fn"),
    "rollout_sample_filter_path": (["my.f:fn"], "hooks.sample_filter", "my.f:fn"),
    "buffer_filter_path": (["my.f:fn"], "hooks.buffer_filter", "my.f:fn"),
    "rollout_all_samples_process_path": (["my.f:fn"], "hooks.batch_samples", "my.f:fn"),
    "custom_rollout_log_function_path": (["my.f:fn"], "hooks.batch_samples", "my.f:fn"),
    "custom_eval_rollout_log_function_path": (["my.f:fn"], "hooks.eval_samples", "my.f:fn"),
    "group_rm": ([], "rollout.group_reward", True),
    "over_sampling_batch_size": (["64"], "rollout.over_sampling_batch_size", 64),
    "n_samples_per_prompt": (["16"], "rollout.n_samples_per_prompt", 16),
    "partial_rollout": (CUT, "rollout.early_stop", True),
    "mask_offpolicy_in_partial_rollout": ([], "rollout.mask_stale", True),
    "rollout_max_response_len": (["8192"], "rollout.sampling.max_new_tokens", 8192),
    "rollout_max_prompt_len": (["512"], "data.max_prompt_tokens", 512),
    "rollout_temperature": (["0.8"], "rollout.sampling.temperature", 0.8),
    "rollout_top_p": (["0.9"], "rollout.sampling.top_p", 0.9),
    "rollout_top_k": (["20"], "rollout.sampling.top_k", 20),
    "rollout_stop": (["###", "[END]", "7"], "rollout.sampling.stop", ["###", "[END]", "7"]),
    "rollout_stop_token_ids": (["1", "2"], "rollout.sampling.stop_token_ids", [1, 2]),
    "eps_clip": (["0.1"], "algorithm.eps_clip", 0.1),
    "eps_clip_high": (["0.3"], "algorithm.eps_clip_high", 0.3),
    "entropy_coef": (["0.01"], "algorithm.entropy_coef", 0.01),
    "prompt_data": (["dapo.jsonl"], "data.path", "dapo.jsonl"),
    "input_key": (["question"], "data.prompt_key", "question"),
    "label_key": (["answer"], "data.label_key", "answer"),
    "metadata_key": (["extra"], "data.metadata_key", "extra"),
    "apply_chat_template": ([], "data.apply_chat_template", True),
    "hf_checkpoint": (["Qwen3-4B"], "model.path", "Qwen3-4B"),
    "num_rollout": (["100"], "steps", 100),
}
"""A flag -> its words, the field that it is about, and what that is then."""


def field(config: RunConfig, dotted: str) -> Any:
    value: Any = config
    for name in dotted.split("."):
        value = getattr(value, name)
    return value


def test_there_is_a_case_for_every_name():
    assert set(FLAGS) == set(SLIME_NAMES)


@pytest.mark.parametrize("name", FLAGS)
def test_a_flag_of_slimes_sets_the_field_that_it_names_and_no_other(name: str):
    words, dotted, value = FLAGS[name]
    extra = words if words is CUT else []
    before = build_config(overlay(BASE, extra))
    flag = f"--{name.replace('_', '-')}"
    after = build_config(overlay(BASE, [flag, *words]))
    assert field(after, dotted) == value != field(before, dotted)
    tree = after.model_dump()
    *tables, last = dotted.split(".")
    place = tree
    for table in tables:
        place = place[table]
    place[last] = field(before, dotted)
    assert tree == before.model_dump()


@pytest.mark.parametrize("name", FLAGS)
def test_in_a_file_slimes_name_is_refused_with_ours(name: str):
    with pytest.raises(ValueError, match=f"{name} is slime's name.*here it is {SLIME_NAMES[name]}"):
        build_config({**BASE, name: FLAGS[name][2]})


@pytest.mark.parametrize("name", sorted(FLAGS.keys() - RolloutConfig.model_fields))
def test_under_a_table_of_ours_slimes_name_is_refused(name: str):
    with pytest.raises(ValueError, match=f"rollout.{name} is slime's name"):
        build_config(overlay(BASE, [f"--rollout.{name}", "1"]))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--partial-rollout"], "rollout.early_stop = true has nothing to cut off"),
        (["--over-sampling-batch-size", "8"], "less than rollout.batch_size = 32"),
        (["--rollout-top-p", "1.5"], "rollout.sampling.top_p = 1.5"),
        (["--rollout-temperature", "-1"], "rollout.sampling.temperature = -1"),
        (["--n-samples-per-prompt", "0"], "rollout.n_samples_per_prompt = 0"),
        (["--rollout-stop-token-ids", "eos"], "rollout.sampling.stop_token_ids.0 = 'eos'"),
        (["--num-rollout", "0"], "steps = 0"),
        (["--group-rm", "my.rm:score"], "rollout.group_reward = 'my.rm:score'"),
        (["--custom-rm-path"], "hooks.reward has no value"),
    ],
)
def test_a_value_that_the_field_cannot_have_is_refused_by_our_name(words: list[str], message: str):
    with pytest.raises(ValueError) as caught:
        build_config(overlay(BASE, words))
    assert message in str(caught.value)


@pytest.mark.parametrize("name", FLAGS)
def test_a_launch_script_is_translated_to_the_same(name: str):
    words, dotted, value = FLAGS[name]
    needed = ["--hf-checkpoint", "m", "--prompt-data", "p", "--num-rollout", "3"]
    needed += ["--custom-rm-path", "pkg.mod:fn"]
    slime_words = [w for w in words if words is not CUT] or (CUT[:2] if words is CUT else [])
    found = from_slime([*needed, f"--{name.replace('_', '-')}", *slime_words])
    assert field(build_config(tomllib.loads(to_toml(found.tree))), dotted) == value


def test_one_gpu_is_shared_and_of_several_each_engine_has_its_own():
    words = ["--colocate", "--actor-num-gpus-per-node", "1"]
    assert from_slime(words).tree["cluster"] == {"colocate": True}
    several = from_slime(["--colocate", "--actor-num-gpus-per-node", "8"])
    assert "cluster" not in several.tree
    assert "one server and one rank may share one GPU" in several.missing["colocate"]


@pytest.mark.parametrize(
    ("words", "algorithm"),
    [
        ("--advantage-estimator reinforce_plus_plus --kl-coef 0.01", {
            "name": "reinforce_pp", "kl_coef": 0.01, "kl_in": "reward", "kl_type": "k1",
        }),
        ("--advantage-estimator ppo --value-clip 0.1 --critic-lr 2e-6 --num-critic-only-steps 1", {
            "name": "ppo", "kl_coef": 0.0,
            "critic": {"value_clip": 0.1, "lr": 2e-6, "warmup_steps": 1},
        }),
        ("--eps-clip 0.1 --kl-loss-coef 0.5", {
            "name": "grpo", "eps_clip": 0.1, "eps_clip_high": 0.1, "kl_coef": 0.0,
        }),
        ("--use-kl-loss --kl-loss-coef 0 --kl-loss-type low_var_kl", {
            "name": "grpo", "kl_coef": 0.0, "kl_watch": True, "kl_type": "low_var",
        }),
        ("--use-kl-loss --kl-loss-coef 0.1 --kl-loss-type k2 --use-tis --tis-clip 3", {
            "name": "grpo", "kl_coef": 0.1, "kl_in": "loss", "kl_type": "k2",
            "correction": {"high": 3.0, "low": 0.0},
        }),
        ("--calculate-per-token-loss", {"name": "grpo", "reduction": "token", "kl_coef": 0.0}),
        ("--loss-type sft_loss", {"name": "sft"}),
    ],
)  # fmt: skip
def test_an_algorithm_of_slimes_is_ours_with_its_terms(words: str, algorithm: dict[str, Any]):
    found = from_slime(words.split())
    assert found.tree["algorithm"] == algorithm
    assert found.missing == {}
    assert build_config({**BASE, "algorithm": algorithm}).algorithm.name == algorithm["name"]


def test_a_kind_of_reward_is_told_once():
    found = from_slime(["--rm-type", "deepscaler"])
    assert "my_reward:score" in found.missing["rm-type"]
    assert "rm-type" not in found.implied


def test_partial_rollout_without_over_sampling_cuts_nothing_and_says_so():
    words = [
        "--hf-checkpoint",
        "m",
        "--prompt-data",
        "p",
        "--num-rollout",
        "3",
        "--partial-rollout",
    ]
    found = from_slime(words)
    assert "early_stop" not in found.tree["rollout"]
    assert "none is cut" in found.implied["partial-rollout"]


def test_what_rollflow_would_refuse_is_told_beside_the_translation(capsys):
    translate("--hf-checkpoint", "m", "--prompt-data", "d.jsonl", "--num-rollout", "10")
    told = capsys.readouterr().out
    assert "# to be mended: rollout.reward: Field required" in told
    assert tomllib.loads(told)["steps"] == 10
