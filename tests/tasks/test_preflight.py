"""Every mistake that can be found before an engine starts is found there, by name."""

import json
import re
from pathlib import Path

import pytest

from rollflow.engines.platform import Platform
from rollflow.flows.arguments import build_config, overlay
from rollflow.flows.recipes import arithmetic
from rollflow.storage.objects import Store
from rollflow.storage.runs import ConfigMismatch, create_run, read_run
from rollflow.tasks.checks import (
    check_colocation,
    check_experts,
    check_generation,
    check_router_replay,
)
from rollflow.tasks.identity import identity, the_rest
from rollflow.tasks.preflight import preflight


@pytest.fixture
def tree(tmp_path):
    files = arithmetic.make(tmp_path)
    return {
        "name": "run",
        "steps": 3,
        "model": {"path": str(files.model), "random_weights": True},
        "data": {"path": str(files.train)},
        "rollout": {
            "reward": "rollflow.engines.rewards.exact_match:exact_match",
            "sampling": {"max_new_tokens": 16},
        },
        "store": {"url": str(tmp_path / "store")},
    }


def constant(inputs):
    """A loss of one's own that forgets where it comes from."""
    return -inputs.logprobs_T.detach()


def nothing(outcomes):
    """An advantage of one's own without a return."""


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--model.path", "/nowhere"], "model.path = '/nowhere' has no config.json"),
        (["--model.random_weights", "false"], "has no *.safetensors"),
        (["--model.dtype", "bfloat16"], "model.dtype = 'bfloat16' on a CPU"),
        (["--cluster.colocate", "true"], "cluster.colocate = true on a CPU"),
        (["--rollout.reward", "nowhere:fn"], "nowhere"),
        (["--rollout.reward", "rollflow.engines.rewards.exact_match:exact_mach"], "exact_match"),
        (["--rollout.generate", "rollflow.engines.rewards.exact_match:exact_match"], "async"),
        (["--data.path", "/nowhere.jsonl"], "/nowhere.jsonl"),
        (["--data.prompt_key", "question"], "question"),
        (["--trainer.router_replay", "true"], "router_replay = true cannot work with model.path"),
        (["--tensor-model-parallel-size", "2"], "trainer.ranks = 1 is no multiple of 2"),
        (["--rollout.judge", '{path = "/nowhere"}'], "rollout.judge.path = '/nowhere'"),
        (
            ["--rollout.groups", '[{name = "p", role = "prefill"}, {name = "d", role = "decode"}]'],
            "rollout.groups p, d: the settings are sound, but this version does not start",
        ),
        (["--algorithm.loss", f"{__name__}:constant"], "gave a tensor without a gradient"),
        (["--algorithm.advantage", f"{__name__}:nothing"], "gave None; give a tensor"),
        (
            ["--algorithm", '{name = "ppo", critic = {path = "/nowhere"}}'],
            "algorithm.critic.path = '/nowhere' has no config.json",
        ),
        (
            ["--algorithm", '{name = "ppo", critic = {lr_warmup_steps = 3}}'],
            "algorithm.critic.lr_warmup_steps = 3 is not below the 3 updates",
        ),
        (["--store.url", "/proc/rollflow"], "store.url = '/proc/rollflow': no run can be written"),
        (["--data.label_key", "answer"], "data.label_key = 'answer': no row has a label there"),
        (["--data.path", "/proc"], "data: path '/proc' is a folder"),
        (["--sources", '[{path = "/nowhere.jsonl"}]'], "sources[0]: path '/nowhere.jsonl'"),
        (["--store.url", "nosuch://bucket"], "store.url = 'nosuch://bucket'"),
        (["--store.url", f"{__file__}/store"], "test_preflight.py is a file; give a folder"),
        (["--rollout.sampling.max_new_tokens", "512"], "rollout.sampling.max_new_tokens = 512"),
        (
            ["--sglang.context_length", "16", "--rollout.sampling.max_new_tokens", "16"],
            "leaves no room for a prompt in the 16 tokens",
        ),
    ],
)
async def test_a_mistake_is_named_before_any_engine_starts(tree, words, message):
    config = build_config(overlay(tree, ["--cluster.device", "cpu", *words]))
    with pytest.raises((ValueError, OSError)) as caught:
        await preflight.fn(config)
    assert message in str(caught.value)


async def test_a_malformed_row_is_named_with_file_line_and_reason(tree, tmp_path):
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"prompt": "1+1=", "label": "2"}\n{"prompt": "1+2=", "label"\n')
    config = build_config(overlay(tree, ["--data.path", str(bad), "--rollout.batch_size", "1"]))
    with pytest.raises(ValueError, match=r"bad\.jsonl.*2"):
        await preflight.fn(config)


async def test_malformed_rows_are_counted_where_they_may_be_skipped(tree, tmp_path, capsys):
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"prompt": "1+1=", "label": "2"}\n{"prompt": "1+2=", "label"\n')
    words = ["--data.path", str(bad), "--data.on_bad_row", "skip", "--rollout.batch_size", "1"]
    await preflight.fn(build_config(overlay(tree, words)))
    assert "1 malformed rows" in capsys.readouterr().out


async def test_the_whole_configuration_is_stored_with_the_run(tree):
    config = build_config(overlay(tree, ["--lr", "1e-4"]))
    plan = await preflight.fn(config)
    assert plan.next_step == 0
    record = read_run(Store(config.store), "run")
    assert build_config(record.settings) == config
    assert record.versions["torch"].startswith("2.")


async def test_steps_decide_where_the_learning_rate_decays_until_the_last(tree):
    decaying = ["--trainer.lr_decay_style", "cosine"]
    await preflight.fn(build_config(overlay(tree, decaying)))
    with pytest.raises(ValueError, match="steps: 3 -> 4"):
        await preflight.fn(build_config(overlay(tree, [*decaying, "--steps", "4"])))


async def test_a_run_goes_on_with_other_ranks_but_not_with_another_learning_rate(tree):
    words = ["--cluster.device", "cpu", "--trainer.ranks"]
    await preflight.fn(build_config(overlay(tree, [*words, "2"])))
    plan = await preflight.fn(build_config(overlay(tree, [*words, "1"])))
    assert plan.next_step == 0
    with pytest.raises(ValueError, match=r"megatron\.lr"):
        await preflight.fn(build_config(overlay(tree, [*words, "1", "--lr", "1e-4"])))


async def test_a_run_goes_on_with_another_number_of_servers(tree):
    for servers in ("2", "1"):
        words = ["--cluster.device", "cpu", "--rollout.servers", servers]
        assert (await preflight.fn(build_config(overlay(tree, words)))).next_step == 0


async def test_a_run_of_an_earlier_version_goes_on(tree):
    config = build_config(overlay(tree, ["--lr", "1e-3"]))
    rollout = {"servers": 1, **identity(config)["rollout"]}  # decided then
    del rollout["affinity"]  # was not there yet
    then = {**identity(config), "rollout": rollout}
    create_run(Store(config.store), "run", then, {}, "", the_rest(config, then))
    assert (await preflight.fn(config)).next_step == 0
    with pytest.raises(ConfigMismatch) as refused:
        await preflight.fn(build_config(overlay(tree, ["--lr", "1e-4"])))
    assert refused.value.keys == ["megatron.lr"]


def test_a_training_without_anybody_to_generate_is_refused(tree):
    nobody = ["--rollout.servers", "0"]
    with pytest.raises(ValueError, match=r"rollout\.servers = 0: nobody answers the prompts"):
        check_generation(build_config(overlay(tree, nobody)))
    hook = ["--rollout.generate", "rollflow.engines.rollout.supervised:generate"]
    check_generation(build_config(overlay(tree, [*nobody, *hook])))


async def test_settings_that_went_through_a_form_name_no_label_column(tree):
    rows = Path(tree["data"]["path"])
    rows.write_text('{"prompt": "1+1="}\n')
    config = build_config(overlay(tree, []))
    await preflight.fn(build_config(config.model_dump(mode="json")))


async def test_an_evaluation_of_labels_needs_no_room_for_answers(tree):
    words = ["--data.path", tree["data"]["path"], "--rollout.servers", "0"]
    loss = f'[{{name = "labels", loss = true, data = {{path = "{tree["data"]["path"]}"}}}}]'
    await preflight.fn(build_config(overlay(tree, [*words, "--evals", loss])))


async def test_a_run_goes_on_with_other_servers_of_somebody_else(tree):
    url = "http://10.0.0.7:3000{}"
    for i in range(2):
        others = f'{{urls = ["{url.format(i)}"], weights = "w"}}'
        plan = await preflight.fn(build_config(overlay(tree, ["--rollout.external", others])))
        assert plan.next_step == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--rollout.mode", "async"], "rollout.mode = 'async' generates while the trainer trains"),
        (["--trainer.ranks", "2"], "trainer.ranks = 2 with cluster.colocate = true"),
        (
            ["--rollout.servers", "2"],
            "rollout.servers and rollout.groups = 2 with cluster.colocate = true",
        ),
        (
            ["--algorithm.name", "distill", "--rollout.teacher", '{path = "t"}'],
            "there is no GPU for the teacher",
        ),
        (["--rollout.judge", '{path = "j"}'], "there is no GPU for the judge"),
        (
            ["--rollout.external", '{urls = ["http://a:1"], weights = "w", spares = 1}'],
            "there is no GPU for a spare",
        ),
        (["--sglang.tp_size", "2"], "GPUs of a server (sglang.tp_size x pp_size) = 2"),
    ],
)
def test_what_cannot_share_a_gpu_is_named(tree, words, message):
    config = build_config(overlay(tree, ["--cluster.colocate", "true", *words]))
    with pytest.raises(ValueError, match=re.escape(message)):
        check_colocation(config, Platform("cuda", "cpu:gloo,cuda:nccl", 1))


@pytest.mark.parametrize(
    ("changes", "device", "message"),
    [
        ({"tie_word_embeddings": True}, "cpu", "with tie_word_embeddings"),
        ({"mlp_only_layers": [0]}, "cpu", "with dense layers between"),
        ({"decoder_sparse_step": 2}, "cpu", "with dense layers between"),
        ({}, "cuda", "on a GPU cannot be verified"),
    ],
)
def test_a_mixture_of_experts_that_servers_would_build_otherwise_is_refused(
    tree, changes, device, message
):
    file = Path(tree["model"]["path"]) / "config.json"
    model = {**json.loads(file.read_text()), "num_experts": 4, "tie_word_embeddings": False}
    file.write_text(json.dumps(model))
    config = build_config(overlay(tree, []))
    check_experts(config, Platform("cpu", "gloo"))
    file.write_text(json.dumps({**model, **changes}))
    with pytest.raises(ValueError, match=f"is a mixture of experts.*{message}"):
        check_experts(config, Platform(device, "gloo", 1))


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--algorithm.name", "sft"], "algorithm.name = 'sft'"),
        (["--rollout.servers", "0"], "rollout.servers = 0"),
        (["--sglang.enable_return_routed_experts", "false"], "would not tell"),
        (["--sglang.pp_size", "2"], "sglang.pp_size above 1"),
        (["--sglang.tokenizer_worker_num", "2"], "sglang.tokenizer_worker_num above 1"),
        (["--moe-router-fusion", "true"], "megatron.moe_router_fusion"),
        (["--moe-router-load-balancing-type", "sinkhorn"], "sinkhorn"),
        (
            ["--recompute-modules", '["moe"]', "--pipeline-model-parallel-size", "2"],
            "megatron.recompute_modules with 'moe' over pipeline stages",
        ),
    ],
)
def test_router_replay_says_what_it_cannot_work_with(tree, words, reason):
    file = Path(tree["model"]["path"]) / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "num_experts": 4}))
    replay = ["--trainer.router_replay", "true"]
    check_router_replay(build_config(overlay(tree, replay)))
    with pytest.raises(ValueError, match=f"router_replay = true cannot work with.*{reason}"):
        check_router_replay(build_config(overlay(tree, [*replay, *words])))
