"""Runs, steps and checkpoints: written once, found again, and damage has a name."""

from typing import Any

import pytest

from rollflow.storage.checkpoints import (
    checkpoint_folder,
    commit_checkpoint,
    delete_checkpoint,
    fetch_checkpoint,
    find_checkpoint,
    list_checkpoints,
    newest_checkpoint,
    prepare_checkpoint,
    read_checkpoint,
    store_files,
    verify_checkpoint,
)
from rollflow.storage.integrity import ManifestError
from rollflow.storage.runs import (
    ConfigMismatch,
    RunNotFound,
    create_run,
    list_runs,
    open_run,
    read_run,
)
from rollflow.storage.steps import commit_step, last_step, read_step, read_steps

CONFIG = {"steps": 3, "rollout": {"batch_size": 8, "stop": []}, "megatron": {"lr": 1e-3}}


def test_a_run_is_created_once_and_opened_afterwards(store):
    run = create_run(store, "r1", CONFIG, {"torch": "2.13.0"}, "abc123")
    assert create_run(store, "r1", CONFIG, {"torch": "2.14.0"}, "") == run
    assert open_run(store, "r1") == open_run(store, "r1", CONFIG) == run
    record = read_run(store, "r1")
    assert record.config == CONFIG
    assert record.versions == {"torch": "2.13.0"}
    assert record.code_revision == "abc123"
    assert run.url == store.join("runs/r1")
    assert [r.ref for r in list_runs(store)] == [run]


def test_another_config_is_refused_with_the_keys_that_differ(store):
    create_run(store, "r1", CONFIG, {}, "")
    other = {"steps": 3, "rollout": {"batch_size": 16, "stop": []}, "megatron": {"tp": 2}}
    for open_with in (
        lambda: create_run(store, "r1", other, {}, ""),
        lambda: open_run(store, "r1", other),
    ):
        with pytest.raises(ConfigMismatch, match=r"rollout.batch_size: 8 -> 16") as caught:
            open_with()
        assert caught.value.keys == ["rollout.batch_size", "megatron.lr", "megatron.tp"]


def test_the_order_of_keys_is_no_difference(store):
    run = create_run(store, "r1", CONFIG, {}, "")
    assert open_run(store, "r1", dict(reversed(CONFIG.items()))) == run


def test_an_unknown_run_is_refused_with_the_known_ones(store):
    create_run(store, "here", CONFIG, {}, "")
    store.put_atomic("runs/half/rollouts/part", b"")
    with pytest.raises(RunNotFound, match=r"'gone' is not in .*there: here\)"):
        open_run(store, "gone")


@pytest.mark.parametrize("name", ["", "../x", "a b", ".hidden", "a/b"])
def test_a_name_that_is_no_folder_is_refused(store, name):
    with pytest.raises(ValueError, match="run name is"):
        create_run(store, name, CONFIG, {}, "")


def test_a_config_that_json_cannot_hold_is_refused(store):
    with pytest.raises(ValueError, match="config"):
        create_run(store, "r1", {"a": (1,)}, {}, "")


def test_a_changed_run_record_is_named(store):
    url = f"{create_run(store, 'r1', CONFIG, {}, '').url}/run.json"
    store.put_atomic(url, store.get(url).replace(b"0.001", b"0.002"))
    with pytest.raises(ManifestError, match=r"run.json: expected sha256"):
        open_run(store, "r1")


def test_steps_are_read_in_order_with_everything_they_say(store, run):
    assert last_step(store, run) is None
    assert read_steps(store, run) == []
    refs = [
        commit_step(
            store, run, step, f"b{step}", f"w{step}", {"train/loss": 0.1 * step},
            ledger={"consumed": [step]}, rng={"data": step},
        )
        for step in range(12)
    ]  # fmt: skip
    assert read_steps(store, run) == refs
    assert last_step(store, run) == refs[-1]
    assert refs[3].url == f"{run.url}/steps/step-000003.json"
    record = read_step(store, run, 3)
    assert (record.ref, record.ledger, record.rng) == (refs[3], {"consumed": [3]}, {"data": 3})


def test_a_step_done_again_gives_the_record_that_stands(store, run):
    ref = commit_step(store, run, 0, "b", "w", {"perf/train_s": 1.0})
    assert commit_step(store, run, 0, "b", "w", {"perf/train_s": 2.0}) == ref


@pytest.mark.parametrize(
    "change", [{"batch_digest": "x"}, {"weights_digest": "x"}, {"rng": {"a": 1}}]
)
def test_a_step_that_came_out_different_is_refused_by_name(store, run, change):
    first = {"batch_digest": "b", "weights_digest": "w", "metrics": {}}
    commit_step(store, run, 0, **first)
    with pytest.raises(ManifestError, match=f"step-000000.json: expected {next(iter(change))}"):
        commit_step(store, run, 0, **(first | change))


def test_a_step_done_again_on_another_layout_may_round_otherwise(store, run):
    two: dict[str, Any] = {"layout": {"ranks": 2}}
    one: dict[str, Any] = {"layout": {"ranks": 1}, "restored_step": 4}
    first = commit_step(store, run, 0, "batch", "weights", {}, **two)
    assert commit_step(store, run, 0, "batch", "other weights", {}, **one) == first
    with pytest.raises(ManifestError, match="batch_digest"):
        commit_step(store, run, 0, "other batch", "weights", {}, **one)
    with pytest.raises(ManifestError, match="weights_digest"):
        commit_step(store, run, 0, "batch", "other weights", {}, **two)
    assert read_step(store, run, 0).layout == {"ranks": 2}


def test_a_step_names_the_users_own_functions_that_computed_it(store, run):
    old, new = {"loss": "mine:loss@aa"}, {"loss": "mine:loss@bb"}
    commit_step(store, run, 0, "batch", "weights", {}, functions=old)
    assert read_step(store, run, 0).functions == {"loss": "mine:loss@aa"}
    commit_step(store, run, 0, "batch", "weights", {}, functions=new)
    with pytest.raises(ManifestError, match=r"weights_digest.*loss@aa'} then, by .*loss@bb'} now"):
        commit_step(store, run, 0, "batch", "other weights", {}, functions=new)


def test_a_missing_step_and_a_misplaced_one_are_named(store, run):
    for step in range(3):
        commit_step(store, run, step, "b", "w", {})
    store.put_atomic(
        f"{run.url}/steps/step-000001.json", store.get(f"{run.url}/steps/step-000002.json")
    )
    with pytest.raises(ManifestError, match=r"step-000001.json.*found the one of .*step-000002"):
        read_steps(store, run)
    store.delete(f"{run.url}/steps/step-000001.json")
    with pytest.raises(ManifestError, match=r"step-000001.json: expected a step record"):
        last_step(store, run)


@pytest.fixture
def staged(tmp_path):
    (tmp_path / "staged/hf").mkdir(parents=True)
    (tmp_path / "staged/weights.distcp").write_bytes(b"w" * 1000)
    (tmp_path / "staged/hf/model.safetensors").write_bytes(b"h" * 500)
    return tmp_path / "staged"


NAMES = ["weights.distcp", "hf/model.safetensors"]


def save(store, run, step, staged, digest="w"):
    files = store_files(store, checkpoint_folder(run, step), staged, NAMES)
    return commit_checkpoint(store, run, step, digest, files, {"next_row": 7})


def test_a_checkpoint_comes_back_file_by_file(store, run, staged, tmp_path):
    assert newest_checkpoint(store, run) is None
    refs = [save(store, run, step, staged) for step in (2, 10)]
    assert newest_checkpoint(store, run) == refs[1]
    assert list_checkpoints(store, run) == refs
    assert read_checkpoint(store, refs[0].url)["details"] == {"next_row": 7}
    folder = fetch_checkpoint(store, refs[0], tmp_path / "fetched")
    assert [(folder / n).read_bytes() for n in NAMES] == [(staged / n).read_bytes() for n in NAMES]


def test_a_checkpoint_without_its_manifest_does_not_exist_and_is_cleared(store, run, staged):
    ref = save(store, run, 2, staged)
    store_files(store, checkpoint_folder(run, 4), staged, NAMES)
    assert newest_checkpoint(store, run) == ref
    assert prepare_checkpoint(store, run, 4) is None
    assert store.list(checkpoint_folder(run, 4)) == []
    assert prepare_checkpoint(store, run, 2) == ref
    assert len(verify_checkpoint(store, ref)) == 2


def test_a_checkpoint_is_committed_once(store, run, staged):
    ref = save(store, run, 2, staged)
    assert save(store, run, 2, staged) == ref
    with pytest.raises(ManifestError, match="weights w, as committed before"):
        save(store, run, 2, staged, digest="other")


def test_a_file_that_was_not_stored_stops_the_commit(store, run, staged):
    files = store_files(store, checkpoint_folder(run, 2), staged, NAMES)
    store.delete(f"{checkpoint_folder(run, 2)}/{NAMES[1]}")
    with pytest.raises(ManifestError, match=r"model.safetensors: expected a file"):
        commit_checkpoint(store, run, 2, "w", files)
    assert find_checkpoint(store, run, 2) is None


@pytest.mark.parametrize("data", [None, b"", b"w" * 999, b"w" * 999 + b"v"])
def test_a_damaged_checkpoint_file_is_named(store, run, staged, data):
    ref = save(store, run, 2, staged)
    url = f"{checkpoint_folder(run, 2)}/{NAMES[0]}"
    store.delete(url)
    if data is not None:
        store.put_atomic(url, data)
    with pytest.raises(ManifestError) as caught:
        verify_checkpoint(store, ref)
    assert caught.value.name == url


def test_a_damaged_checkpoint_manifest_is_named(store, run, staged):
    url = f"{save(store, run, 2, staged).url}/manifest.json"
    store.put_atomic(url, store.get(url)[:-9])
    with pytest.raises(ManifestError) as caught:
        newest_checkpoint(store, run)
    assert caught.value.name == url


def test_a_deleted_checkpoint_leaves_nothing(store, run, staged):
    older, newer = (save(store, run, step, staged) for step in (2, 4))
    delete_checkpoint(store, newer)
    assert newest_checkpoint(store, run) == older
    assert store.list(newer.url) == []
