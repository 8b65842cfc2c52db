"""Checkpoints of a training with real engines, each evaluated on engines of its own beside it: ``make evaluated``.

Trainer, servers, Ray, worker and server share this machine with the evaluation's, so the steps beside it
take longer; by how much is printed, and how long after a checkpoint its evaluation began.
"""

import itertools
import statistics
from datetime import datetime

import pytest

from rollflow.storage.checkpoints import checkpoint_url, read_checkpoint
from rollflow.storage.manifests import find_batch, read_table
from rollflow.storage.steps import read_step_records

from .operated import Stack

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]
EVERY, STEPS = 150, 450
WORDS = {
    "name": "beside",
    "steps": STEPS,
    "cluster.address": "local",
    "checkpoint.every": EVERY,
    "checkpoint.evaluate": "true",
    "trainer.max_tokens_per_micro_batch": 256,
    "megatron.lr": 1e-4,
}


def timestamp(text):
    return datetime.fromisoformat(text.replace("Z", "+00:00")).timestamp()


@pytest.fixture(scope="module")
def stack(tmp_path_factory):
    stack = Stack(tmp_path_factory.mktemp("beside"))
    try:
        stack.rollflow("submit", "run.toml", *(f"--{k}={v}" for k, v in WORDS.items()))
        stack.wait("the training", lambda: stack.state("beside") == "Completed", 1200)
        stack.wait("all evaluations", lambda: len(evaluations(stack)) == STEPS // EVERY, 300)
        yield stack
    finally:
        print(stack.rollflow("down"))


def evaluations(stack):
    """The evaluations that have ended, by the step of their checkpoint."""
    runs = [r for r in stack.flow_runs("evaluate beside") if r["state_name"] == "Completed"]
    return {run["parameters"]["step"]: run for run in runs}


def test_each_checkpoint_was_evaluated_with_its_own_weights_beside_the_training(stack):
    store, run = stack.stored("beside")
    for step in range(EVERY - 1, STEPS, EVERY):
        batch = find_batch(store, run, step + 1, "heldout")
        assert batch is not None
        versions = read_table(store, batch)["policy_versions"].to_pylist()
        assert set(itertools.chain.from_iterable(versions)) == {step + 1}
        assert f"step-{step:06d}" in stack.artifact("beside-evaluations")
    [training] = stack.flow_runs("beside")
    assert training["run_count"] == 1


def test_steps_beside_an_evaluation_are_told_from_the_others(stack):
    store, run = stack.stored("beside")
    ends = [timestamp(r.committed_at) for r in read_step_records(store, run)]
    spans = [
        (timestamp(r["start_time"]), timestamp(r["end_time"])) for r in evaluations(stack).values()
    ]
    beside, alone = [], []
    for begun, ended in itertools.pairwise(ends):
        overlaps = any(start < ended and begun < end for start, end in spans)
        (beside if overlaps else alone).append(ended - begun)
    assert beside
    assert alone
    latencies = []
    for step, flow_run in evaluations(stack).items():
        committed = read_checkpoint(store, checkpoint_url(run, step))["committed_at"]
        latencies.append(timestamp(flow_run["start_time"]) - timestamp(committed))
    print(
        f"\nsteps beside an evaluation: {len(beside)}, median {statistics.median(beside):.2f} s; "
        f"alone: {len(alone)}, median {statistics.median(alone):.2f} s; an evaluation takes "
        f"{statistics.median(end - start for start, end in spans):.0f} s and begins "
        f"{', '.join(f'{s:.1f}' for s in sorted(latencies))} s after its checkpoint's commit"
    )
