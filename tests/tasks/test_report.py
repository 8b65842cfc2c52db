"""What a person is shown of a step and of a run."""

from pathlib import Path

import httpx
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from rollflow.storage.glance import Glance, Transcript
from rollflow.storage.refs import BatchRef, RunRef
from rollflow.tasks.config import MlflowConfig, ReportConfig
from rollflow.tasks.page import Page
from rollflow.tasks.report import histogram, iteration_page
from rollflow.tasks.trackers import Trackers, check_trackers

RUN = RunRef("r1", "/store/runs/r1")
BATCH = BatchRef(RUN, 7, "/store/runs/r1/rollouts/step-000007", 8, 2, "d")


def transcript(reward, response="4"):
    return Transcript("000007/x#0", "2+2=", response, "4", reward, "completed")


def test_a_histogram_counts_every_value_once():
    lines = histogram([0.0, 0.1, 0.5, 1.0, 1.0]).splitlines()
    assert sum(int(line.split()[-1]) for line in lines) == 5
    assert int(lines[-1].split()[-1]) == 2


def test_equal_rewards_are_one_bar_and_none_are_said_to_be_none():
    assert histogram([0.5, 0.5]).endswith(" 2")
    assert "no sample" in histogram([])


def test_the_page_of_a_step_shows_best_median_and_worst():
    seen = Glance([0.0, 0.5, 1.0], 2, transcript(1.0), transcript(0.5), transcript(0.0))
    page = iteration_page(BATCH, {"train/loss": 0.25}, seen)
    for part in (
        "Best: reward 1",
        "Median: reward 0.5",
        "Worst: reward 0",
        "| train/loss | 0.25 |",
    ):
        assert part in page
    assert "2 samples failed" in page


def test_a_transcript_cannot_leave_its_fence():
    seen = Glance([1.0], 0, transcript(1.0, "```\n# a heading\n```"), None, None)
    assert "````\n```\n# a heading\n```\n````" in iteration_page(BATCH, {}, seen)


def test_a_late_evaluation_finds_its_place_on_the_page():
    page = Page(RUN, 100, 0.0)
    for version, reward in ((40, 0.4), (20, 0.2), (60, 0.6)):
        page.evaluated(version, {"eval/heldout/reward": reward})
    lines = [line for line in page.markdown("training").splitlines() if line.startswith("| ")]
    assert [line.split(" | ")[0] for line in lines[1:]] == ["| 20", "| 40", "| 60"]


def test_a_page_of_ten_thousand_steps_stays_small():
    page = Page(RUN, 10_000, 0.0)
    for step in range(10_000):
        page.add(step, {"rollout/reward": step % 7 / 7, "train/loss": 1 / (1 + step)})
    assert len(page.markdown("training")) < 120_000


@pytest.fixture
def in_folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_tensorboard_has_every_step(in_folder):
    trackers = Trackers(ReportConfig(), RUN, {})
    for step in range(3):
        trackers.write(step, {"train/loss": float(step)})
    trackers.close()
    events = EventAccumulator(str(in_folder / ".rollflow/tensorboard/r1")).Reload()
    assert [e.value for e in events.Scalars("train/loss")] == [0.0, 1.0, 2.0]


def test_prometheus_is_served_on_loopback_while_the_run_goes_on(in_folder, unused_tcp_port):
    trackers = Trackers(ReportConfig(prometheus_port=unused_tcp_port), RUN, {})
    trackers.write(4, {"train/loss": 0.5, "rollout/reward": 0.75})
    url = f"http://127.0.0.1:{unused_tcp_port}/metrics"
    text = httpx.get(url).text
    assert 'rollflow_metric{metric="rollout/reward",run="r1"} 0.75' in text
    assert 'rollflow_step{run="r1"} 5.0' in text
    trackers.close()
    with pytest.raises(httpx.ConnectError):
        httpx.get(url)


def test_a_tracker_that_is_not_installed_is_refused_by_name(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"rollflow\[mlflow\]"):
        check_trackers(ReportConfig(mlflow=MlflowConfig()))


def test_a_tracker_that_fails_does_not_end_the_run(in_folder, capsys):
    class Broken:
        def write(self, step, metrics):
            raise ConnectionError("no route")

        def close(self):
            pass

    trackers = Trackers(ReportConfig(), RUN, {})
    trackers._all.append(Broken())
    for step in range(3):
        trackers.write(step, {"train/loss": 1.0})
    trackers.close()
    told = capsys.readouterr().out
    assert told.count("no route") == 1
    assert "3 writes to Broken failed" in told
