"""Runs made from a run, by the command line: replayed, scored again, forked, and asked about."""

import json
import subprocess
import sys

import httpx
import pytest

from rollflow.storage import open_run

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

WITHOUT_SGLANG = """
import sys
from importlib.machinery import PathFinder

class Absent(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if name.partition(".")[0] in ("sglang", "sglang_router", "sgl_kernel"):
            return None
        return PathFinder.find_spec(name, path, target)

sys.meta_path = [Absent if finder is PathFinder else finder for finder in sys.meta_path]
"""


@pytest.fixture
def stored(derive_folder):
    folder, _ = derive_folder
    return lambda name: open_run(str(folder / f".rollflow/store/runs/{name}"))


def test_a_replay_of_the_whole_run_gives_every_step_and_checkpoint_bit_for_bit(
    derive_folder, stored
):
    _, rollflow = derive_folder
    rollflow("replay", "source", "--into", "replayed")
    source, replayed = stored("source"), stored("replayed")
    digests = [[c.weights_digest for c in run.checkpoints()] for run in (source, replayed)]
    assert digests[0] == digests[1]
    assert len(digests[0]) == 2
    steps = [[s.ref.weights_digest for s in run.steps()] for run in (source, replayed)]
    assert steps[0] == steps[1]
    assert "0 findings" in rollflow("audit", "replayed")
    assert "finished already" in rollflow("replay", "source", "--into", "replayed")


def test_another_algorithm_learns_from_stored_batches_where_sglang_is_not_installed(
    derive_folder, stored
):
    folder, rollflow = derive_folder
    (folder / "absent").mkdir()
    (folder / "absent/sitecustomize.py").write_text(WITHOUT_SGLANG)
    path = str(folder / "absent")
    probe = [sys.executable, "-c", "import sglang"]
    assert subprocess.run(probe, env={"PYTHONPATH": path}, capture_output=True).returncode
    changes = ("--set", "algorithm.advantage=group_mean", "--set", "algorithm.reduction=sequence")
    shown = rollflow("replay", "source", "--into", "other", *changes, PYTHONPATH=path)
    assert "algorithm.advantage" in shown
    source, other = stored("source"), stored("other")
    assert [s.ref.batch_digest for s in other.steps()] == [
        s.ref.batch_digest for s in source.steps()
    ]
    assert other.steps()[0].ref.weights_digest != source.steps()[0].ref.weights_digest


def test_the_same_grader_gives_every_reward_again_and_another_stands_beside_it(
    derive_folder, stored
):
    _, rollflow = derive_folder
    rollflow("rescore", "source", "--reward", "my_reward:first_digit", "--into", "same")
    rollflow("rescore", "source", "--reward", "my_reward:longest", "--into", "longer")
    assert "0 with another reward" in rollflow("rollouts", "diff", "source", "same")
    rows = stored("longer").samples().to_pylist()
    before = stored("source").samples().to_pylist()
    assert [r["previous_reward"] for r in rows] == [r["reward"] for r in before]
    assert {r["reward"] for r in rows if r["status"] == "truncated"} == {4.0}
    assert all(r["previous_grader"].startswith("my_reward:first_digit@") for r in rows)
    assert all(r["grader"].startswith("my_reward:longest@") for r in rows)
    assert "0 findings" in rollflow("audit", "longer")


def test_a_fork_goes_on_from_a_checkpoint_by_other_settings(derive_folder, stored):
    _, rollflow = derive_folder
    changes = ("--lr", "1e-4", "--algorithm.advantage", "my_reward:twice")
    rollflow("fork", "source", "--step", "0", "--into", "forked", *changes)
    forked = stored("forked")
    [step] = forked.steps()
    assert (step.ref.step, step.ref.metrics["train/lr"]) == (1, 1e-4)
    assert step.functions["advantage"].startswith("my_reward:twice@")
    assert "0 findings" in rollflow("audit", "forked")
    assert rollflow("lineage", "forked", "step-000001", "--ids").count("\n") == 32


def test_batches_are_generated_without_a_trainer_by_the_weights_of_a_run(derive_folder, stored):
    _, rollflow = derive_folder
    weights = ("--weights-of", "source", "--step", "0")
    told = rollflow("rollout", "run.toml", "--name", "generated", "--steps", "1", *weights)
    assert "1 batches" in told
    rows = stored("generated").samples().to_pylist()
    assert len(rows) == 16
    assert all(r["rollout_logprobs"] and r["reward"] is not None for r in rows)
    assert rollflow("lineage", "generated", f"{rows[0]['group_id']}#{rows[0]['index']}")


def test_what_a_checkpoint_and_a_sample_came_from_is_told(derive_folder, stored):
    _, rollflow = derive_folder
    assert rollflow("lineage", "source", "step-000001", "--ids").count("\n") == 32
    sample = stored("source").samples(1).to_pylist()[0]
    told = rollflow("lineage", "source", f"{sample['group_id']}#{sample['index']}")
    for fact in (str(sample["seed"]), sample["grader"], "1 x", "step 1 of source", "gradient norm"):
        assert fact in told


def test_the_server_that_the_commands_name_shows_their_flows(derive_folder):
    folder, rollflow = derive_folder
    rollflow("rescore", "source", "--reward", "my_reward:longest", "--into", "seen")
    server = json.loads((folder / ".rollflow/prefect/server.json").read_text())["url"]
    found = httpx.post(f"{server}/api/flow_runs/filter", json={"limit": 100}, timeout=30).json()
    assert {"source", "seen"} <= {r["name"] for r in found if r["state_type"] == "COMPLETED"}
