"""What is superseded goes, what a record still names stays, and an audit can tell."""

from dataclasses import replace

import pytest

from rollflow.storage.audit import audit_run
from rollflow.storage.checkpoints import (
    checkpoint_folder,
    commit_checkpoint,
    list_checkpoints,
    newest_valid_checkpoint,
    store_files,
)
from rollflow.storage.inspect import batch_rows
from rollflow.storage.lease import LeaseLostError, acquire
from rollflow.storage.manifests import batch_folder, commit_batch, find_batch
from rollflow.storage.refs import RunRef
from rollflow.storage.retention import find_garbage, remove
from rollflow.storage.runs import Origin, create_run
from rollflow.storage.shards import ShardWriter
from rollflow.storage.steps import commit_step


@pytest.fixture
def old(store, make_sample, tmp_path) -> RunRef:
    """Six steps, of which the last is not consumed yet; checkpoints after 1, 3 and 4."""
    run = create_run(store, "old", {}, {}, "")
    (tmp_path / "weights").write_bytes(b"weights")
    for step in range(6):
        writer = ShardWriter(store, run, batch_folder(run, step))
        group = f"{step:06d}/train.jsonl:{step}"
        sample = replace(make_sample(step, 0), run="old", step=step, group_id=group)
        writer.append([replace(sample, policy_versions=[0] * 3)])
        ref = commit_batch(
            store, run, writer.folder, step, writer.parts,
            groups=1, policy_versions=[0], metrics={}, ledger={},
        )  # fmt: skip
        if step < 5:
            commit_step(store, run, step, ref.digest, f"w{step}", {})
        if step in (1, 3, 4):
            files = store_files(store, checkpoint_folder(run, step), tmp_path, ["weights"])
            commit_checkpoint(store, run, step, f"w{step}", files)
    return run


def steps_of(refs) -> list[int]:
    return [ref.step for ref in refs]


def test_all_but_the_newest_whole_checkpoints_are_superseded(store, old):
    assert steps_of(find_garbage(store, old).checkpoints) == [1, 3]
    assert steps_of(find_garbage(store, old, keep=2).checkpoints) == [1]
    assert find_garbage(store, old, keep=3).checkpoints == []
    with pytest.raises(ValueError, match="keep is 0"):
        find_garbage(store, old, keep=0)


def test_rollouts_stay_unless_asked_for_and_go_only_up_to_a_checkpoint_that_stays(store, old):
    assert find_garbage(store, old).batches == []
    assert steps_of(find_garbage(store, old, rollouts=True).batches) == [0, 1, 2, 3, 4]
    assert steps_of(find_garbage(store, old, keep=2, rollouts=True).batches) == [0, 1, 2, 3]


def test_a_damaged_checkpoint_supersedes_nothing(store, old):
    store.put_atomic(f"{checkpoint_folder(old, 4)}/weights", b"other")
    found = find_garbage(store, old, rollouts=True)
    assert steps_of(found.checkpoints) == [1]
    assert steps_of(found.batches) == [0, 1, 2, 3]
    assert [url[-11:] for url in found.kept] == ["step-000004"]


def test_what_was_found_is_removed_and_nothing_else(store, old):
    before = set(store.list(old.url))
    found = find_garbage(store, old, rollouts=True)
    remove(store, old, found)
    gone = before - set(store.list(old.url))
    assert {url.removeprefix(f"{old.url}/").partition("/")[0] for url in gone} == {
        "checkpoints", "rollouts",
    }  # fmt: skip
    assert steps_of(list_checkpoints(store, old)) == [4]
    assert newest_valid_checkpoint(store, old)[1] == []
    assert [find_batch(store, old, step) is None for step in range(6)] == [True] * 5 + [False]
    assert find_garbage(store, old, rollouts=True).batches == []


def test_an_audit_tells_what_was_removed_from_what_was_lost(store, old):
    remove(store, old, find_garbage(store, old, rollouts=True))
    report = audit_run(store, old)
    assert report.findings == []
    assert report.counts["batches removed"] == 5
    assert batch_rows(store, old, newest=3)[1] == {"step": 4, "committed": False, "removed": True}
    store.delete(f"{batch_folder(old, 2)}/removed.json")
    [finding] = audit_run(store, old).findings
    assert finding.name == f"{batch_folder(old, 2)}/manifest.json"


def test_batches_that_a_replay_trains_on_stay(store, old):
    create_run(store, "new", {}, {}, "", origin=Origin("replay", "old", 0, batches="old"))
    found = find_garbage(store, old, rollouts=True)
    assert found.batches == []
    assert set(found.kept.values()) == {"run 'new' trains on it"}


def test_a_batch_that_its_step_did_not_consume_stays(store, old):
    store.delete(f"{old.url}/steps/step-000004.json")
    commit_step(store, old, 4, "another batch", "w4", {})
    found = find_garbage(store, old, rollouts=True)
    assert steps_of(found.batches) == [0, 1, 2, 3]
    assert list(found.kept.values()) == ["no committed step names it"]


def test_whoever_lost_the_run_removes_nothing(store, old):
    late = acquire(store, old, "late", 30).run
    found = find_garbage(store, late, rollouts=True)
    stranger = replace(late, epoch=late.epoch + 1)
    before = store.list(old.url)
    with pytest.raises(LeaseLostError):
        remove(store, stranger, found)
    assert store.list(old.url) == before
