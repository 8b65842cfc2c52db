"""What a person sees is what was committed."""

import pytest

from rollflow.storage.checkpoints import commit_checkpoint
from rollflow.storage.inspect import batch_rows, batch_samples, run_rows
from rollflow.storage.manifests import batch_folder, read_batch
from rollflow.storage.runs import create_run
from rollflow.storage.shards import ShardWriter
from rollflow.storage.steps import commit_step


def test_runs_are_listed_with_their_progress(store):
    run = create_run(store, "r1", {}, {}, "abc")
    create_run(store, "r2", {}, {}, "")
    commit_step(store, run, 0, "b", "w", {"rollout/reward": 0.25})
    commit_checkpoint(store, run, 0, "w", [])
    first, second = run_rows(store)
    assert (first["name"], first["steps"], first["checkpoint"], first["reward"]) == (
        "r1",
        1,
        0,
        0.25,
    )
    assert (first["code_revision"], first["url"]) == ("abc", run.url)
    assert (second["name"], second["steps"], second["checkpoint"]) == ("r2", 0, None)


def test_batches_are_listed_committed_or_not(store, run, committed):
    ref, _ = committed
    ShardWriter(store, run, batch_folder(run, 4)).append([])
    done, open_ = batch_rows(store, run)
    assert (done["step"], done["rows"], done["digest"]) == (3, 6, ref.digest)
    assert open_ == {"step": 4, "committed": False}
    assert batch_rows(store, run, newest=1) == [open_]
    assert batch_rows(store, run, "heldout") == []


def test_samples_of_the_newest_committed_step_are_shown(store, run, committed):
    ref, _ = committed
    ShardWriter(store, run, batch_folder(run, 4)).append([])
    assert batch_samples(store, run) == batch_samples(store, run, 3) == read_batch(store, ref)


def test_samples_that_are_not_committed_are_not_shown(store, run, committed):
    with pytest.raises(ValueError, match=r"no committed batch of step 4; .* steps \[3\]"):
        batch_samples(store, run, 4)
