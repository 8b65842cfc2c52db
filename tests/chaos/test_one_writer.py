"""Two flows on one run: one works. A flow that slept past its lease does nothing when it wakes."""

import os
import signal
import subprocess

import pytest

from rollflow.storage.audit import audit_run
from rollflow.storage.steps import read_steps

from .harness import ROLLFLOW, Session, Training, left_behind, prepare

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
WORDS = ("--cluster.lease_s", "20", "--rollout.deterministic", "false")


@pytest.fixture
def session(tmp_path):
    prepare(tmp_path, Training(steps=8, engines=1))
    session = Session(tmp_path, "chaos", *WORDS)
    first = session.flow
    yield session
    for flow in (first, session.flow):
        flow.kill()
        flow.wait()
    subprocess.run([*ROLLFLOW, "down"], cwd=tmp_path, check=True, timeout=60)


def test_a_second_flow_is_refused_and_a_sleeper_is_fenced_off(session):
    assert session.wait_for("train", step=1) == ""
    sleeper = session.flow
    [rank] = session.processes("trainer")
    rank.suspend()  # the flow waits for it, and keeps its lease
    second = subprocess.run(
        [*ROLLFLOW, "train", "run.toml", "--name", "chaos", *WORDS],
        cwd=session.folder,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert second.returncode == 1
    assert f"pid {sleeper.pid}" in second.stderr
    assert "'chaos' is held by" in second.stderr

    os.kill(sleeper.pid, signal.SIGSTOP)
    rank.resume()
    at_sleep = len(read_steps(session.store, session.run))
    assert session.wait_until_lease_is_over() == ""
    session.restart(*WORDS)  # takes the run over
    assert session.wait_for("train", step=at_sleep) == ""
    os.kill(sleeper.pid, signal.SIGCONT)
    assert sleeper.wait(timeout=120) == 1
    assert session.finish() == ""

    assert "is refused" in (session.folder / "chaos.log").read_text()
    assert [s.step for s in read_steps(session.store, session.run)] == list(range(8))
    report = audit_run(session.store, session.run)
    assert report.findings == []
    assert left_behind(session.folder) == []
