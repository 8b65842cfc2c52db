"""W&B and MLflow in their offline modes: ``make trackers``. What they wrote is read back."""

import struct
import time

import pytest
from mlflow.tracking import MlflowClient
from wandb.proto import wandb_internal_pb2

from rollflow.storage.refs import RunRef
from rollflow.tasks.config import MlflowConfig, ReportConfig, WandbConfig
from rollflow.tasks.trackers import Trackers

RUN = RunRef("r1", "/store/runs/r1")
SETTINGS = {"steps": 3, "rollout": {"batch_size": 4}}


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return tmp_path


def logged(data):
    """The records of W&B's file: LevelDB's log format after 7 bytes of its own."""
    block, header, whole = 32768, struct.Struct("<IHB"), b""
    full, last = 1, 4
    place = 7
    while place + header.size <= len(data):
        if (left := block - place % block) < header.size:
            place += left
            continue
        _, size, kind = header.unpack_from(data, place)
        whole += data[place + header.size : place + header.size + size]
        place += header.size + size
        if kind in (full, last):
            yield whole
            whole = b""


def written(file, deadline_s=60.0):
    """All records of a run, once the last is there: W&B's own process writes them, and outlives the run."""
    begun = time.monotonic()
    while time.monotonic() - begun < deadline_s:
        records = [wandb_internal_pb2.Record.FromString(data) for data in logged(file.read_bytes())]
        if records and records[-1].WhichOneof("record_type") == "exit":
            return records
        time.sleep(0.1)
    raise AssertionError(f"{file} did not end within {deadline_s:.0f} s")


def test_mlflow_has_the_settings_and_every_step_in_one_run_though_it_was_gone_on_with(folder):
    config = ReportConfig(mlflow=MlflowConfig())
    for steps in (range(2), range(2, 4)):
        trackers = Trackers(config, RUN, SETTINGS)
        for step in steps:
            trackers.write(step, {"train/loss": 1.0 / (1 + step)})
        trackers.write(4, {"eval/heldout/reward": 0.5, "eval/heldout/pass@4": 0.75})
        trackers.close()
        assert not trackers._failures
    client = MlflowClient(tracking_uri=f"sqlite:///{folder}/.rollflow/mlflow.db")
    experiment = client.get_experiment_by_name("rollflow")
    [run] = client.search_runs([experiment.experiment_id])
    history = client.get_metric_history(run.info.run_id, "train/loss")
    assert [(m.step, m.value) for m in history] == [(s, 1.0 / (1 + s)) for s in range(4)]
    assert run.data.params["rollout.batch_size"] == "4"
    assert run.data.metrics["eval/heldout/reward"] == 0.5
    assert run.data.metrics["eval/heldout/pass_at_4"] == 0.75
    assert run.info.status == "FINISHED"


def test_wandb_writes_every_step_offline_and_orders_them_by_step_and_version(folder):
    trackers = Trackers(ReportConfig(wandb=WandbConfig(project="p")), RUN, SETTINGS)
    for step in range(3):
        trackers.write(step, {"train/loss": float(step)})
    trackers.write(2, {"eval/heldout/reward": 0.5})
    trackers.close()
    assert not trackers._failures
    [file] = folder.glob(".rollflow/wandb/wandb/offline-run-*/run-*.wandb")
    history = [r.history for r in written(file) if r.WhichOneof("record_type") == "history"]
    rows = [{i.key or "/".join(i.nested_key): i.value_json for i in h.item} for h in history]
    assert [r["train/loss"] for r in rows[:3]] == ["0", "1", "2"]
    assert [r["step"] for r in rows[:3]] == ["0", "1", "2"]
    assert (rows[3]["eval/heldout/reward"], rows[3]["version"]) == ("0.5", "2")
