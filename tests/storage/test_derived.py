"""Runs made from others: where their steps begin, whose batches they use, what went into them."""

from dataclasses import replace

import pytest

from rollflow.storage.audit import audit_run
from rollflow.storage.checkpoints import checkpoint_folder, commit_checkpoint, store_files
from rollflow.storage.inspect import batch_rows, batch_samples, find_sample
from rollflow.storage.integrity import ManifestError
from rollflow.storage.lineage import samples_of, trained_steps
from rollflow.storage.manifests import batch_folder, commit_batch
from rollflow.storage.origins import (
    batch_home,
    checkpoint_before,
    clear_unborn,
    copy_checkpoint,
    stored_batches,
)
from rollflow.storage.query import query
from rollflow.storage.refs import RunRef
from rollflow.storage.runs import Origin, create_run, read_run, run_ref
from rollflow.storage.shards import ShardWriter
from rollflow.storage.steps import commit_step, read_steps


@pytest.fixture
def write(store, make_sample, tmp_path):
    """Commit steps of a run: a batch of one group, a record, and a checkpoint of some."""

    def batch(run: RunRef, step: int) -> str:
        writer = ShardWriter(store, run, batch_folder(run, step))
        pair = [make_sample(step, index) for index in (0, 1)]
        group = f"{step:06d}/train.jsonl:{step}"
        own = {"run": run.name, "step": step, "group_id": group, "policy_versions": [step] * 3}
        writer.append([replace(sample, **own) for sample in pair])
        return commit_batch(
            store, run, writer.folder, step, writer.parts,
            groups=1, policy_versions=[step], metrics={}, ledger={},
        ).digest  # fmt: skip

    def checkpoint(run: RunRef, step: int) -> None:
        (tmp_path / "weights").write_bytes(b"w%d" % step)
        files = store_files(store, checkpoint_folder(run, step), tmp_path, ["weights"])
        commit_checkpoint(store, run, step, f"{run.name} w{step}", files, {"hf": False})

    def steps(run: RunRef, numbers, saved=(), digests=None) -> RunRef:
        for step in numbers:
            digest = digests[step] if digests else batch(run, step)
            commit_step(store, run, step, digest, f"{run.name} w{step}", {})
            if step in saved:
                checkpoint(run, step)
        return run

    return steps


@pytest.fixture
def source(store, write) -> RunRef:
    return write(create_run(store, "source", {"a": 1}, {}, ""), range(4), saved=(1, 3))


@pytest.fixture
def forked(store, write, source) -> RunRef:
    checkpoint = checkpoint_before(store, source, 2)
    assert checkpoint
    copy_checkpoint(store, checkpoint, run_ref(store, "forked"))
    run = create_run(store, "forked", {"a": 2}, {}, "", origin=Origin("fork", "source", 2))
    return write(run, range(2, 5), saved=(4,))


@pytest.fixture
def replayed(store, write, source) -> RunRef:
    origin = Origin("replay", "source", 0, batches="source")
    run = create_run(store, "replayed", {"a": 1}, {}, "", origin=origin)
    digests = {ref.step: ref.digest for ref in stored_batches(store, source, 0, None)}
    return write(run, range(4), saved=(3,), digests=digests)


def test_a_fork_begins_where_it_left_its_source_and_is_sound(store, forked):
    assert [step.step for step in read_steps(store, forked)] == [2, 3, 4]
    report = audit_run(store, forked)
    assert report.findings == []
    assert report.counts["checkpoints"] == 2


def test_a_replay_trains_on_the_batches_of_its_source_and_is_sound(store, source, replayed):
    assert batch_home(store, replayed) == source
    assert audit_run(store, replayed).findings == []
    assert [row["rows"] for row in batch_rows(store, replayed)] == [2, 2, 2, 2]
    assert batch_samples(store, replayed, 1)[0].run == "source"
    assert find_sample(store, replayed, "000002/train.jsonl:2#1").step == 2
    assert query(store, replayed, "SELECT count(*) AS n FROM samples").to_pylist() == [{"n": 8}]
    again = create_run(
        store, "again", {}, {}, "", origin=Origin("replay", "replayed", 0, batches="source")
    )
    assert stored_batches(store, again, 1, 3) == stored_batches(store, source, 1, 3)


def test_an_audit_finds_a_step_that_a_replay_trained_on_something_else(store, replayed, source):
    url = f"{replayed.url}/steps/step-000002.json"
    store.delete(url)
    commit_step(store, replayed, 2, "another", "replayed w2", {})
    assert {finding.name for finding in audit_run(store, replayed).findings} == {url}


def test_a_run_without_its_record_is_cleared_and_one_with_it_is_not(store, source, forked):
    checkpoint = checkpoint_before(store, source, 2)
    assert checkpoint
    unborn = run_ref(store, "unborn")
    copy_checkpoint(store, checkpoint, unborn)
    for run in (unborn, forked):
        clear_unborn(store, run)
    assert store.list(unborn.url) == []
    assert checkpoint_before(store, forked, 2) is not None


def test_a_step_without_a_checkpoint_before_it_is_no_place_to_start(store, source, forked):
    assert checkpoint_before(store, source, 0) is None
    with pytest.raises(ValueError, match=r"no checkpoint of step 2.*it has those of steps 1, 3"):
        checkpoint_before(store, source, 3)
    found = checkpoint_before(store, forked, 2)
    assert found is not None
    store.put_atomic(f"{checkpoint_folder(source, 1)}/weights", b"other")
    with pytest.raises(ManifestError, match="weights"):
        checkpoint_before(store, source, 2)


@pytest.mark.parametrize("steps", [(0, 9), (4, None), (2, 2)])
def test_batches_that_are_not_there_are_named(store, source, steps):
    with pytest.raises(ValueError, match=r"no committed batch of .*; it has steps 0 to 3"):
        stored_batches(store, source, *steps)


def test_a_run_goes_on_only_by_the_command_that_made_it(store, source, replayed, forked):
    assert read_run(store, "forked").origin == Origin("fork", "source", 2)
    assert create_run(store, "forked", {"a": 2}, {}, "") == forked
    for name, config, origin in (
        ("replayed", {"a": 1}, None),
        ("replayed", {"a": 1}, Origin("replay", "source", 1, batches="source")),
        ("source", {"a": 1}, Origin("fork", "forked", 2)),
    ):
        with pytest.raises(ValueError, match=rf"run '{name}' exists and was made"):
            create_run(store, name, config, {}, "", origin=origin)


def test_a_checkpoint_of_a_fork_knows_every_batch_that_made_it(store, forked):
    steps = trained_steps(store, forked, 4)
    assert [(t.run.name, t.record.ref.step) for t in steps] == [
        ("source", 0), ("source", 1), ("forked", 2), ("forked", 3), ("forked", 4),
    ]  # fmt: skip
    ids = [sample.sample_id for trained in steps for sample in samples_of(store, trained)]
    assert len(ids) == 10
    assert ids[4] == "000002/train.jsonl:2#0"
    with pytest.raises(ValueError, match="no checkpoint of step 3"):
        trained_steps(store, forked, 3)


def test_a_checkpoint_whose_batch_is_gone_or_other_is_named(store, forked, source):
    store.delete(f"{batch_folder(source, 0)}/manifest.json")
    with pytest.raises(ManifestError, match=r"step-000000.json: .*found no committed batch"):
        trained_steps(store, forked, 4)
