"""Old checkpoints go and milestones stay."""

import pytest

from rollflow.engines.megatron.config import CheckpointConfig
from rollflow.storage.checkpoints import (
    checkpoint_folder,
    checkpoint_steps,
    commit_checkpoint,
    store_files,
)
from rollflow.storage.config import StoreConfig
from rollflow.storage.objects import Store
from rollflow.storage.refs import RunRef
from rollflow.tasks.checkpoint import delete_expired


@pytest.mark.parametrize(
    ("settings", "kept"),
    [
        ({}, [1, 3, 5, 7, 9]),
        ({"keep_last": 2}, [7, 9]),
        ({"keep_last": 1, "keep_every": 4}, [3, 7, 9]),
        ({"keep_last": 9}, [1, 3, 5, 7, 9]),
    ],
)
def test_the_newest_and_the_milestones_stay(tmp_path, settings, kept):
    store = Store(StoreConfig(url=str(tmp_path / "store")))
    run = RunRef("r", store.run_url("r"))
    (tmp_path / "weights").write_bytes(b"w")
    for step in (1, 3, 5, 7, 9):
        files = store_files(store, checkpoint_folder(run, step), tmp_path, ["weights"])
        commit_checkpoint(store, run, step, f"digest {step}", files)
    delete_expired(store, CheckpointConfig(**settings), run)
    assert [
        s for s in checkpoint_steps(store, run) if store.list(f"{run.url}/checkpoints/step-{s:06d}")
    ] == kept
