"""Each algorithm's recipe trains a few steps of the real loop: SGLang, Megatron ranks, Ray, Prefect.

`make recipes` runs them; the suite reads every recipe.
"""

import os
import subprocess
import sys

import pytest

from rollflow.engines.config import ModelConfig
from rollflow.flows.arguments import load_config, recipes
from rollflow.flows.recipes import arithmetic
from rollflow.storage.config import StoreConfig
from rollflow.storage.manifests import find_batch, read_batch
from rollflow.storage.objects import Store
from rollflow.storage.runs import open_run
from rollflow.storage.samples import TEACHER_LOGPROBS
from rollflow.storage.steps import read_steps

ALL = os.environ.get("ROLLFLOW_RECIPES") == "all"
NAMES = [name for name in recipes() if name.startswith("arithmetic_") and name.endswith("_cpu")]
SMALL = (
    *("--steps", "2", "--evals", "[]", "--trainer.ranks", "1", "--rollout.servers", "1"),
    *("--rollout.batch_size", "8", "--rollout.n_samples_per_prompt", "4"),
    *("--trainer.lr_warmup_steps", "0"),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Data, and random weights that stand for the warmed-up ones and for a teacher."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("recipes")
    files = arithmetic.make(folder / ".rollflow/arithmetic")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(files.model)).float()
    for name in ("warm", "trained"):
        place = files.model.with_name(name)
        model.save_pretrained(place)
        for file in files.model.iterdir():
            if file.name != "config.json":
                (place / file.name).write_bytes(file.read_bytes())
    yield folder
    subprocess.run([sys.executable, "-m", "rollflow", "down"], cwd=folder, timeout=100)


def train(folder, name):
    """Two steps; (committed steps, samples of the last)."""
    config = load_config(recipes()[name], ())
    words = list(SMALL)
    if config.algorithm.name == "sft":
        words += ["--stop", "null"]
    if config.algorithm.name == "ppo":
        words += ["--algorithm.critic", "{ lr = 2e-4, warmup_steps = 1 }"]
    command = "sft" if config.algorithm.name == "sft" else "train"
    done = subprocess.run(
        [sys.executable, "-m", "rollflow", command, name, *words],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    store = Store(StoreConfig(url=str(folder / ".rollflow/store")))
    run = open_run(store, config.name)
    batch = find_batch(store, run, 1)
    assert batch is not None
    return read_steps(store, run), read_batch(store, batch)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.skipif(not ALL, reason="make recipes runs it")
@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_trains_a_few_steps_of_the_real_loop(folder, name):
    steps, samples = train(folder, name)
    assert [s.step for s in steps] == [0, 1]
    metrics = steps[-1].metrics
    assert metrics["train/grad_norm"] > 0
    if not name.startswith("arithmetic_sft"):
        assert metrics["mismatch/logprob_gap_max"] < 1e-4
        assert 0.9 < metrics["mismatch/ess"] <= 1
    if name == "arithmetic_ppo_cpu":
        assert steps[0].metrics["critic/grad_norm"] > 0
        assert "train/grad_norm" not in steps[0].metrics
    if name == "arithmetic_distill_cpu":
        # The teacher holds the first weights: what it gives them it gives its own tokens.
        assert abs(steps[0].metrics["train/kl_teacher"]) < 1e-4
        scores = [s.metadata[TEACHER_LOGPROBS] for s in samples]
        assert [len(x) for x in scores] == [len(s.response_ids) for s in samples]


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_can_be_read_and_is_named_after_its_algorithm(name):
    config = load_config(recipes()[name], ())
    assert config.model == ModelConfig(path=config.model.path, random_weights="sft" in name)
    words = name.removeprefix("arithmetic_").removesuffix("cpu").strip("_")
    assert config.algorithm.name == (words or "grpo")
