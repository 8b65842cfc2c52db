"""A whole training on two SGLang servers that somebody else started, one of which dies on the way. More
groups are begun than are trained on, for a filter drops some."""

import asyncio
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from rollflow.engines.config import ModelConfig
from rollflow.engines.rollout.server import ServerActor
from rollflow.flows.recipes import arithmetic
from rollflow.storage.config import StoreConfig
from rollflow.storage.manifests import find_batch, read_batch
from rollflow.storage.objects import Store
from rollflow.storage.runs import open_run, run_ref
from rollflow.storage.steps import read_steps, step_numbers

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

STEPS = 12
CONFIG = """
name = "elsewhere"
steps = {steps}
[model]
path = "arithmetic/model"
random_weights = true
[data]
path = "arithmetic/train.jsonl"
[rollout]
batch_size = 8
over_sampling_batch_size = 12
n_samples_per_prompt = 4
servers = 0
reward = "rollflow.engines.rewards.exact_match:exact_match"
sampling = {{ max_new_tokens = 4 }}
[hooks]
dynamic_filter = "my_filter:two_of_three"
[rollout.external]
urls = {urls}
weights = "weights"
health_every_s = 0.5
[trainer]
max_tokens_per_micro_batch = 64
[megatron]
lr = 1e-3
"""

FILTER = """
def two_of_three(samples):
    return int(samples[0].prompt_id.rpartition(":")[2]) % 3 != 0
"""


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Iterator[tuple[Path, list[str], str]]:
    """The folder of the run, the servers' URLs (the first of them was killed), what the command said."""
    folder = tmp_path_factory.mktemp("elsewhere")
    arithmetic.make(folder / "arithmetic")
    model = ModelConfig(path=str(folder / "arithmetic/model"), random_weights=True)
    theirs = [ServerActor(f"theirs-{i}", str(folder / "logs"), "cpu") for i in range(2)]

    async def start() -> list[str]:
        up = await asyncio.gather(*(s.start(model, {}, 0, 300.0) for s in theirs))
        return [info.url for info in up]

    run: subprocess.Popen[bytes] | None = None
    try:
        urls = asyncio.run(start())
        (folder / "run.toml").write_text(CONFIG.format(steps=STEPS, urls=urls))
        (folder / "my_filter.py").write_text(FILTER)
        with (folder / "told").open("wb") as told:
            run = subprocess.Popen(
                [sys.executable, "-m", "rollflow", "train", "run.toml"],
                cwd=folder, stdout=told, stderr=told,
            )  # fmt: skip
            until_step(folder, 2, run)
            theirs[0].stop()
            assert run.wait(300) == 0, (folder / "told").read_text()
        yield folder, urls, (folder / "told").read_text()
    finally:
        if run is not None:
            run.kill()
            run.wait()
        for server in theirs:
            server.stop()
        subprocess.run([sys.executable, "-m", "rollflow", "down"], cwd=folder, timeout=100)


def until_step(folder: Path, step: int, run: subprocess.Popen[bytes]) -> None:
    store = Store(StoreConfig(url=str(folder / ".rollflow/store")))
    deadline = time.monotonic() + 300
    while step not in step_numbers(store, run_ref(store, "elsewhere")):
        assert run.poll() is None, (folder / "told").read_text()
        assert time.monotonic() < deadline, f"waited 300 s for step {step}"
        time.sleep(0.02)


def test_every_sample_of_every_step_is_there_and_was_generated_by_the_trainers_weights(trained):
    folder, _, _ = trained
    store = Store(StoreConfig(url=str(folder / ".rollflow/store")))
    run = open_run(store, "elsewhere")
    steps = read_steps(store, run)
    assert [record.step for record in steps] == list(range(STEPS))
    for record in steps:
        batch = find_batch(store, run, record.step)
        assert batch is not None
        samples = read_batch(store, batch)
        assert len({s.sample_id for s in samples}) == 32
        assert {int(s.prompt_id.rpartition(":")[2]) % 3 for s in samples} == {1, 2}
        assert {v for s in samples for v in s.policy_versions} == {record.step}
        assert record.metrics["mismatch/logprob_gap_max"] < 1e-4


def test_the_server_that_died_is_named_and_the_other_is_not(trained):
    _, urls, told = trained
    told_of = [line for line in told.splitlines() if "gets no requests" in line]
    assert any(urls[0] in line for line in told_of)
    assert not any(urls[1] in line for line in told_of)


def test_no_weights_are_left_behind(trained):
    folder, _, _ = trained
    assert list((folder / "weights").iterdir()) == []
