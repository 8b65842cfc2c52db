"""A run on a GPU whose flow is killed in the middle goes on: with the weights that it would have had, or of its log."""

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
ROLLFLOW = (sys.executable, "-m", "rollflow")
WORDS = (
    *("--steps", str(STEPS), "--model.random_weights", "true", "--evals", "[]"),
    *("--trainer.lr_decay_style", "constant", "--trainer.lr_warmup_steps", "0"),
    *("--rollout.batch_size", "16", "--checkpoint.hf", "false", "--checkpoint.every", "3"),
    *("--rollout.reward", "rollflow.flows.recipes.throughput:share_of_even_tokens"),
    *("--sglang.mem_fraction_static", "0.2"),
    *("--model.path", ".rollflow/arithmetic-gpu/model"),
)


def start(folder, name, *more):
    with (folder / f"{name}.txt").open("ab") as output:
        process = subprocess.Popen(
            [*ROLLFLOW, "train", "arithmetic_gpu", *WORDS, *more, "--name", name],
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


def run_to_the_end(folder, name, *more):
    assert start(folder, name, *more).wait(START_S) == 0, (folder / f"{name}.txt").read_text()[
        -4000:
    ]


def run_killed_in_the_middle(folder, *more):
    """Kill a run's flow after some steps, have another go on to the end, and print what that took."""
    flow = start(folder, "killed", *more)
    deadline = time.monotonic() + START_S
    while len(digests(folder, "killed")) < KILLED_AFTER:
        assert flow.poll() is None, (folder / "killed.txt").read_text()[-4000:]
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.kill(flow.pid, signal.SIGKILL)
    flow.wait()
    killed = time.monotonic()
    before = digests(folder, "killed")
    again = start(folder, "killed", *more)
    while len(digests(folder, "killed")) <= len(before):
        assert again.poll() is None, (folder / "killed.txt").read_text()[-4000:]
        assert time.monotonic() < killed + START_S
        time.sleep(0.02)
    lost_s = time.monotonic() - killed
    assert again.wait(START_S) == 0
    facts = {"killed_after_steps": len(before), "seconds_until_the_next_step": round(lost_s, 1)}
    print(json.dumps({**facts, "card": torch.cuda.get_device_name(), "options": more}))
    assert KILLED_AFTER <= len(before) < STEPS


@pytest.fixture
def folder(tmp_path):
    """Where runs are, with a model; what they started is ended."""
    arithmetic.make(tmp_path / ".rollflow/arithmetic-gpu", model=arithmetic.GPU_MODEL)
    try:
        yield tmp_path
    finally:
        for process in STARTED:
            process.kill()
            process.wait()
        subprocess.run([*ROLLFLOW, "down"], cwd=tmp_path, check=False)


def test_a_killed_run_ends_with_the_weights_of_one_that_was_not(folder):
    exact = ("--rollout.deterministic", "true")
    run_to_the_end(folder, "whole", *exact)
    run_killed_in_the_middle(folder, *exact)
    assert digests(folder, "killed") == digests(folder, "whole")


def test_where_answers_are_drawn_anew_the_log_alone_gives_every_weight_again(folder):
    """By default the same policy may answer otherwise after a kill; of what is in the log nothing is otherwise."""
    run_killed_in_the_middle(folder)
    done = subprocess.run(
        [*ROLLFLOW, "audit", "killed", "--recompute"],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=START_S,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert "log: 0 differences" in done.stdout
