"""The real loop, from the command line to the store: two SGLang servers behind the router, two
tensor parallel Megatron ranks, Ray, a Prefect flow, Arrow shards. One start of the engines serves many claims."""

import subprocess
import sys
from pathlib import Path

import pytest

from rollflow.flows.recipes import arithmetic
from rollflow.storage.checkpoints import fetch_checkpoint, newest_checkpoint
from rollflow.storage.config import StoreConfig
from rollflow.storage.manifests import find_batch, read_batch
from rollflow.storage.objects import Store
from rollflow.storage.runs import open_run
from rollflow.storage.shards import part_names
from rollflow.storage.steps import read_step, read_step_records, read_steps
from tests.chaos.harness import left_behind

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

ROLLFLOW = (sys.executable, "-m", "rollflow")
CONFIG = """
name = "loop"
steps = 3
[model]
path = "arithmetic/model"
random_weights = true
[data]
path = "arithmetic/train.jsonl"
[rollout]
batch_size = 8
n_samples_per_prompt = 4
servers = 2
shard_groups = 3
reward = "my_reward:first_digit"
sampling = { max_new_tokens = 4 }
[trainer]
ranks = 2
max_tokens_per_micro_batch = 64
updates_per_batch = 2
[checkpoint]
every = 2
[megatron]
lr = 1e-3
tensor_model_parallel_size = 2
[[evals]]
name = "heldout"
every = 2
data = { path = "arithmetic/heldout.jsonl@[0:20]", shuffle = false }
sampling = { temperature = 0.0, max_new_tokens = 4 }
reward = "rollflow.engines.rewards.exact_match:exact_match"
"""
REWARD = '''
def first_digit(sample):
    """A reward of one's own: is the first character a digit, and is the answer short?"""
    digit = float(sample.response_text[:1].isdigit())
    return {"reward": digit, "digit": digit, "length": float(len(sample.response_ids))}
'''
ALONE = ("--trainer.ranks", "1", "--tensor-model-parallel-size", "1")


def rollflow(folder: Path, *words: str) -> str:
    """Run the command line in ``folder``; its output, on failure too."""
    command = [*ROLLFLOW, *words]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, f"{' '.join(words)}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("loop")
    arithmetic.make(folder / "arithmetic")
    (folder / "run.toml").write_text(CONFIG)
    (folder / "my_reward.py").write_text(REWARD)
    rollflow(folder, "train", "run.toml")
    yield folder
    rollflow(folder, "down")


@pytest.fixture(scope="module")
def stored(folder):
    store = Store(StoreConfig(url=str(folder / ".rollflow/store")))
    return store, open_run(store, "loop")


def test_every_step_has_a_batch_of_all_its_samples_and_a_record(stored):
    store, run = stored
    steps = read_steps(store, run)
    assert [s.step for s in steps] == [0, 1, 2]
    for record in steps:
        batch = find_batch(store, run, record.step)
        assert batch is not None
        assert record.batch_digest == batch.digest
        samples = read_batch(store, batch)
        assert len({s.sample_id for s in samples}) == 32
        assert {s.index for s in samples} == {0, 1, 2, 3}
        assert {v for s in samples for v in s.policy_versions} == {record.step}


def test_shards_are_written_while_generation_still_runs(folder):
    parts = list((folder / ".rollflow/store/runs/loop/rollouts/step-000000").glob("part-*.arrow"))
    assert len(parts) >= 2


def test_trainer_and_rollout_agree_about_every_log_probability(stored):
    store, run = stored
    for record in read_steps(store, run):
        assert 0 <= record.metrics["mismatch/logprob_gap_max"] < 1e-4


def test_the_trainer_was_tensor_parallel(stored):
    store, run = stored
    layout = {"ranks": 2, "tensor_model_parallel_size": 2}
    assert [read_step(store, run, step).layout for step in range(3)] == [layout] * 3


def test_every_step_changes_the_weights(stored):
    store, run = stored
    digests = [s.weights_digest for s in read_steps(store, run)]
    assert len(set(digests)) == 3


def test_a_reward_of_ones_own_is_stored_with_its_named_parts(stored):
    store, run = stored
    batch = find_batch(store, run, 0)
    assert batch is not None
    samples = read_batch(store, batch)
    for sample in samples:
        assert sample.reward == sample.reward_parts["digit"]
        assert sample.reward_parts["length"] == len(sample.response_ids)
        assert sample.grader.startswith("my_reward:first_digit@")


def test_the_last_step_leaves_a_checkpoint_that_hugging_face_can_load(stored):
    from transformers import AutoModelForCausalLM

    store, run = stored
    checkpoint = newest_checkpoint(store, run)
    assert checkpoint is not None
    assert checkpoint.step == 2
    folder = fetch_checkpoint(store, checkpoint, Path("unused: the store is local"))
    model = AutoModelForCausalLM.from_pretrained(folder / "hf")
    assert model.config.num_hidden_layers == 4


def test_evaluations_are_stored_like_batches(stored):
    store, run = stored
    for version in (0, 2, 3):
        batch = find_batch(store, run, version, "heldout")
        assert batch is not None
        assert batch.rows == 20
        assert "eval/heldout/reward" in batch.metrics


def test_no_process_is_left_behind(folder):
    assert left_behind(folder) == []


def test_tensorboard_and_the_picture_are_written(folder):
    assert list((folder / ".rollflow/tensorboard/loop").glob("events.*"))
    assert (folder / ".rollflow/store/runs/loop/reward.png").read_bytes()[:4] == b"\x89PNG"


def test_stored_samples_can_be_read_on_the_command_line(folder):
    assert "loop" in rollflow(folder, "runs", "ls")
    assert "000002" in rollflow(folder, "rollouts", "ls", "loop").replace(" 2 ", "000002")
    shown = rollflow(folder, "rollouts", "show", "loop", "--step", "1", "--limit", "2")
    assert "my_reward:first_digit" in shown


def test_more_steps_continue_the_run_on_other_ranks_and_servers_and_all_can_be_recomputed(
    folder, stored
):
    store, run = stored
    before = {s.step: s for s in read_steps(store, run)}
    rollflow(folder, "train", "run.toml", "--steps", "4", *ALONE, "--rollout.servers", "1")
    after = {s.step: s for s in read_steps(store, run)}
    assert sorted(after) == [0, 1, 2, 3]
    assert all(after[n] == before[n] for n in before)
    records = read_step_records(store, run)
    assert [r.layout["ranks"] for r in records] == [2, 2, 2, 1]
    assert records[3].restored_step == 2
    assert "0 differences" in rollflow(folder, "audit", "loop", "--recompute")


def test_a_finished_run_trains_nothing_and_says_so(folder):
    told = rollflow(folder, "train", "run.toml", "--steps", "4")
    assert "finished already (4 steps are trained, steps = 4;" in told


def test_a_checkpoint_can_be_evaluated_without_a_trainer_and_without_the_lease(folder, stored):
    (folder / "later.toml").write_text(CONFIG.replace('name = "heldout"', 'name = "later"'))
    words = ("--steps", "4", "--step", "1", "--rollout.servers", "1")
    assert "eval/later/reward" in rollflow(folder, "evaluate", "later.toml", *words)
    store, run = stored
    batch = find_batch(store, run, 2, "later")
    assert batch is not None
    assert batch.rows == 20
    assert all(name.startswith("part-x") for name in part_names(store, batch.url))
    again = rollflow(folder, "evaluate", "later.toml", *words)  # read, not repeated
    assert "eval/later/reward" in again


def test_a_run_is_not_continued_with_other_settings(folder):
    command = [*ROLLFLOW, "train", "run.toml", "--lr", "1e-4"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert "megatron.lr" in done.stderr


def test_supervised_training_and_its_validation_loss_need_no_server(folder):
    heldout = '[{name="heldout",loss=true,every=1,data={path="arithmetic/heldout.jsonl@[0:20]"}}]'
    words = (
        "--name",
        "labels",
        "--steps",
        "2",
        "--algorithm",
        '{name = "sft"}',
        "--evals",
        heldout,
    )
    rollout = ("--rollout.servers", "0", "--rollout.n-samples-per-prompt", "1")
    hook = ("--rollout.generate", "rollflow.engines.rollout.supervised:generate")
    rollflow(folder, "sft", "run.toml", *words, *ALONE, *rollout, *hook)
    store = Store(StoreConfig(url=str(folder / ".rollflow/store")))
    run = open_run(store, "labels")
    losses = [s.metrics["train/loss"] for s in read_steps(store, run)]
    assert len(losses) == 2
    assert losses[1] < losses[0]
    evaluations = [find_batch(store, run, version, "heldout") for version in range(3)]
    measured = [batch.metrics["eval/heldout/loss"] for batch in evaluations if batch is not None]
    assert len(measured) == 3
    assert measured[2] < measured[1] < measured[0]
    assert measured[0] == pytest.approx(losses[0], rel=0.3)  # of other sums
