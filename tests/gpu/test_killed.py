"""A run on a GPU whose flow is killed in the middle goes on, and ends with the weights that it would have had."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from rollflow.flows.recipes import arithmetic
from rollflow.storage.config import StoreConfig
from rollflow.storage.objects import Store
from rollflow.storage.runs import open_run
from rollflow.storage.steps import read_steps

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU"),
    pytest.mark.timeout(580),
]

STEPS, KILLED_AFTER = 6, 4
"""Steps of a run; how many are committed when the other run's flow is killed."""
START_S = 200
STARTED: list[subprocess.Popen[bytes]] = []
"""None of them outlives the test."""
WORDS = (
    *("--steps", str(STEPS), "--model.random_weights", "true", "--evals", "[]"),
    *("--trainer.lr_decay_style", "constant", "--trainer.lr_warmup_steps", "0"),
    *("--rollout.batch_size", "16", "--checkpoint.hf", "false", "--checkpoint.every", "3"),
    *("--rollout.reward", "rollflow.flows.recipes.throughput:share_of_even_tokens"),
    *("--rollout.deterministic", "true", "--sglang.mem_fraction_static", "0.2"),
    *("--model.path", ".rollflow/arithmetic-gpu/model"),
)


def start(folder, name):
    with (folder / f"{name}.txt").open("ab") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "rollflow", "train", "arithmetic_gpu", *WORDS, "--name", name],
            cwd=folder,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    STARTED.append(process)
    return process


def digests(folder, name):
    store = Store(StoreConfig(url=str(folder / ".rollflow/store")))
    try:
        return [step.weights_digest for step in read_steps(store, open_run(store, name))]
    except (ValueError, OSError):
        return []


def run_to_the_end(folder, name):
    assert start(folder, name).wait(START_S) == 0, (folder / f"{name}.txt").read_text()[-4000:]


def test_a_killed_run_ends_with_the_weights_of_one_that_was_not(tmp_path):
    arithmetic.make(tmp_path / ".rollflow/arithmetic-gpu", model=arithmetic.GPU_MODEL)
    try:
        run_to_the_end(tmp_path, "whole")
        flow = start(tmp_path, "killed")
        deadline = time.monotonic() + START_S
        while len(digests(tmp_path, "killed")) < KILLED_AFTER:
            assert flow.poll() is None, (tmp_path / "killed.txt").read_text()[-4000:]
            assert time.monotonic() < deadline
            time.sleep(0.02)
        os.kill(flow.pid, signal.SIGKILL)
        flow.wait()
        killed = time.monotonic()
        before = digests(tmp_path, "killed")
        again = start(tmp_path, "killed")
        while len(digests(tmp_path, "killed")) <= len(before):
            assert again.poll() is None, (tmp_path / "killed.txt").read_text()[-4000:]
            assert time.monotonic() < killed + START_S
            time.sleep(0.02)
        lost_s = time.monotonic() - killed
        assert again.wait(START_S) == 0
    finally:
        for process in STARTED:
            process.kill()
            process.wait()
        subprocess.run([sys.executable, "-m", "rollflow", "down"], cwd=tmp_path, check=False)
    facts = {"killed_after_steps": len(before), "seconds_until_the_next_step": round(lost_s, 1)}
    print(json.dumps({**facts, "card": torch.cuda.get_device_name()}))
    assert KILLED_AFTER <= len(before) < STEPS
    assert digests(tmp_path, "killed") == digests(tmp_path, "whole")
