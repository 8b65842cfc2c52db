"""One small training by the command line, for every test of this folder that looks at what it left."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from rollflow.flows.recipes import arithmetic

CONFIG = """
name = "source"
steps = 2
[model]
path = "arithmetic/model"
random_weights = true
[data]
path = "arithmetic/train.jsonl"
[rollout]
batch_size = 4
n_samples_per_prompt = 4
servers = 1
reward = "my_reward:first_digit"
sampling = { max_new_tokens = 4 }
[trainer]
max_tokens_per_micro_batch = 64
[checkpoint]
every = 1
[megatron]
lr = 1e-3
"""
REWARD = """
def first_digit(sample):
    return {"reward": float(sample.response_text[:1].isdigit()), "length": 1.0}


def longest(sample):
    return float(len(sample.response_ids))


def twice(outcomes):
    return 2.0 * outcomes.rewards_N
"""
Run = Callable[..., str]


@pytest.fixture(scope="session")
def derive_folder(tmp_path_factory) -> Iterator[tuple[Path, Run]]:
    """The folder of a run ``source`` of two steps, and how to call the command in it."""
    folder = tmp_path_factory.mktemp("derive")
    arithmetic.make(folder / "arithmetic")
    (folder / "run.toml").write_text(CONFIG)
    (folder / "my_reward.py").write_text(REWARD)

    def run(*words: str, **environment: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "rollflow", *words],
            cwd=folder, capture_output=True, text=True, timeout=500,
            env={**os.environ, **environment},
        )  # fmt: skip
        assert done.returncode == 0, f"{' '.join(words)}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    run("train", "run.toml")
    yield folder, run
    run("down")
