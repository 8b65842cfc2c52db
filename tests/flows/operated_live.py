"""Runs that a worker does for a Prefect server, with engines that compute nothing.

Everything else is real: server, worker, flow processes, store, leases, automations. The claims about
killed processes take minutes and run by ``make operated``.
"""

import json
import os
import signal

import psutil
import pytest

from rollflow.storage.checkpoints import checkpoint_steps
from rollflow.storage.lease import check_free
from rollflow.storage.manifests import batch_steps, find_batch
from rollflow.storage.steps import step_numbers

from .operated import Stack

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
EVERY = 200
"""Steps from one checkpoint to the next, whose evaluation takes as long as some hundred steps."""
KILLS = os.environ.get("ROLLFLOW_OPERATED") == "all"


@pytest.fixture(scope="module")
def stack(tmp_path_factory):
    stack = Stack(tmp_path_factory.mktemp("operated"))
    words = ("--checkpoint.every", str(EVERY), "--checkpoint.evaluate", "true", "--name", "a")
    stack.rollflow("submit", "run.toml", *words)
    yield stack
    print(stack.rollflow("down"))


@pytest.fixture(scope="module")
def running(stack):
    stack.rollflow("submit", "run.toml", "--name", "k")
    stack.wait("step 3", lambda: stack.status("k")["step"] >= 3)
    yield stack
    stack.rollflow("cancel", "k")


def batch_of(stack, step, dataset=None):
    store, run = stack.stored("a")
    return find_batch(store, run, step, dataset)


def evaluation_of(stack, step):
    runs = stack.flow_runs("evaluate a")
    [evaluation] = [run for run in runs if run["parameters"]["step"] == step]
    return evaluation


def digest_of(stack, step):
    batch = batch_of(stack, step)
    assert batch is not None
    return batch.digest


def test_a_run_that_was_submitted_is_trained_by_the_worker(stack):
    stack.wait("step 3", lambda: stack.status("a")["step"] >= 3)
    assert stack.state("a") == "Running"


def test_a_second_run_waits_for_the_cluster(stack):
    stack.rollflow("submit", "run.toml", "--name", "b", "--steps", "3")
    assert stack.state("b") in ("Scheduled", "Late")


def test_a_run_that_has_not_ended_is_not_submitted_again(stack):
    with pytest.raises(AssertionError, match=r"name = 'a': flow run .* of it is running"):
        stack.rollflow("submit", "run.toml", "--name", "a")


def test_a_suspended_run_ends_between_two_steps_and_gives_back_its_lease(stack):
    stack.wait("the first checkpoint", lambda: stack.status("a")["step"] > EVERY)
    stack.rollflow("pause", "a")
    stack.wait("the end of the flow", lambda: stack.status("a")["phase"] == "suspended")
    stack.wait("its process", lambda: not psutil.pid_exists(stack.status("a")["pid"]))
    store, run = stack.stored("a")
    assert step_numbers(store, run) == batch_steps(store, run)  # no step was left half done
    check_free(store, run)  # raises where it is held
    assert checkpoint_steps(store, run)[-1] == step_numbers(store, run)[-1]
    assert stack.state("a") == "Suspended"


def test_the_run_that_waited_has_the_cluster_while_the_first_is_suspended(stack):
    stack.wait("run b", lambda: stack.state("b") == "Completed")
    assert len(step_numbers(*stack.stored("b"))) == 3


def test_a_checkpoint_is_evaluated_by_a_flow_run_of_its_own(stack):
    stack.wait("the evaluation", lambda: batch_of(stack, EVERY, "heldout"))
    stack.wait("its flow run", lambda: evaluation_of(stack, EVERY - 1)["state_name"] == "Completed")
    evaluation = evaluation_of(stack, EVERY - 1)
    assert evaluation["parameters"]["run"] == "a"
    assert evaluation["created_by"]["type"] == "AUTOMATION"
    assert f"step-{EVERY - 1:06d}" in stack.artifact("a-evaluations")


def test_a_suspended_run_goes_on_where_it_stopped_when_it_is_resumed(stack):
    before = len(step_numbers(*stack.stored("a")))
    digest = digest_of(stack, before - 1)
    stack.rollflow("resume", "a")
    stack.wait("new steps", lambda: len(step_numbers(*stack.stored("a"))) > before + 3)
    assert digest_of(stack, before - 1) == digest
    [flow_run] = stack.flow_runs("a")
    assert flow_run["state_name"] == "Running"


def test_an_iteration_shows_its_numbers_its_rewards_and_three_transcripts(stack):
    page = stack.artifact("a-iteration")
    for part in ("## Rewards", "## Best", "## Median", "## Worst", "rollout/reward", "train/loss"):
        assert part in page
    assert "data:image/png;base64," in stack.artifact("a-run")


def test_a_cancelled_run_ends_in_order_and_keeps_what_it_committed(stack):
    pid = stack.status("a")["pid"]
    stack.rollflow("cancel", "a")
    stack.wait("cancellation", lambda: stack.state("a") == "Cancelled")
    stack.wait("the end of the process", lambda: not psutil.pid_exists(pid))
    assert stack.status("a")["phase"] == "cancelled"
    store, run = stack.stored("a")
    check_free(store, run)
    assert checkpoint_steps(store, run)


@pytest.mark.skipif(not KILLS, reason="minutes: make operated")
class TestKills:
    """Nobody does anything; the seconds until the next committed step are printed."""

    def goes_on(self, stack, what, deadline_s=300.0):
        steps = len(step_numbers(*stack.stored("k")))
        more = lambda: len(step_numbers(*stack.stored("k"))) > steps + 2  # noqa: E731
        print(f"{what}: {stack.wait(what, more, deadline_s):.1f} s")

    def test_the_flow(self, running):
        os.kill(running.status("k")["pid"], signal.SIGKILL)
        self.goes_on(running, "SIGKILL of the flow")

    def test_the_worker(self, running):
        os.kill(self.worker(running), signal.SIGKILL)
        self.goes_on(running, "SIGKILL of the worker")

    def test_the_server(self, running):
        os.kill(running.server["pid"], signal.SIGKILL)
        self.goes_on(running, "SIGKILL of the Prefect server")

    def test_worker_and_flow_at_once(self, running):
        stack = running
        stack.wait("a worker", lambda: psutil.pid_exists(self.worker(stack)))
        pids = self.worker(stack), stack.status("k")["pid"]
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        self.goes_on(stack, "SIGKILL of worker and flow at once")

    def test_the_process_that_keeps_the_worker(self, running):
        kept = json.loads((running.folder / ".rollflow/prefect/stack.json").read_text())
        os.kill(kept["pid"], signal.SIGKILL)
        running.rollflow("up")
        assert self.worker(running) == kept["worker"]
        self.goes_on(running, "SIGKILL of the process that keeps the worker, and `rollflow up`")

    def test_what_had_ended_in_order_was_not_started_again(self, running):
        assert running.state("a") == "Cancelled"
        assert running.state("b") == "Completed"
        evaluations = running.flow_runs("evaluate a")
        assert {run["run_count"] for run in evaluations} == {1}

    def worker(self, stack):
        return json.loads((stack.folder / ".rollflow/prefect/stack.json").read_text())["worker"]
