"""A seeded few of the kills that ``make chaos`` does many of, and two flows on one run."""

import signal
import subprocess

import pytest

from .harness import PHASES, ROLLFLOW, VICTIMS, Session, plan
from .run import run_sessions

pytestmark = pytest.mark.slow


def test_the_schedule_is_the_same_for_the_same_seed_and_covers_every_pair():
    schedule = plan(3, len(VICTIMS) * len(PHASES))
    assert schedule == plan(3, len(VICTIMS) * len(PHASES))
    assert len({(kill.process, kill.phase) for kill in schedule}) == len(VICTIMS) * len(PHASES)


@pytest.mark.timeout(900)
def test_a_killed_run_ends_with_the_weights_of_a_run_that_nobody_killed_and_has_one_writer(
    tmp_path,
):
    # Of this seed the first three kills are of a server, the flow and a trainer, in three phases.
    rows = run_sessions(
        tmp_path, seed=67, kills=3, per_session=3, parallel=2, engines=1, last=outlive_a_sleeper
    )
    assert len(rows) == 3
    for row in rows:
        assert row.recovered, row
        assert row.digest_equal, row
        assert row.lost == 0, row
        assert row.note == "", row


def outlive_a_sleeper(session: Session) -> None:
    """A second flow is refused while the first has its lease; once that sleeps past it, another takes
    the run over, and the sleeper does nothing when it wakes."""
    assert session.wait_for("train", step=session.committed()) == ""
    sleeper = session.flow
    [rank] = session.processes("trainer")
    rank.suspend()  # the flow waits for it, and keeps its lease
    try:
        second = subprocess.run(
            [*ROLLFLOW, "train", "run.toml", "--name", session.name],
            cwd=session.folder,
            capture_output=True,
            text=True,
            timeout=120,
        )
        sleeper.send_signal(signal.SIGSTOP)
    finally:
        rank.resume()
    try:
        assert second.returncode == 1
        assert f"pid {sleeper.pid}" in second.stderr
        assert "'chaos' is held by" in second.stderr
        at_sleep = session.committed()
        assert session.wait_until_lease_is_over() == ""
        session.restart()
        assert session.wait_for("train", step=at_sleep) == ""
        sleeper.send_signal(signal.SIGCONT)
        assert sleeper.wait(timeout=120) == 1
    finally:
        sleeper.kill()
        sleeper.wait()
    assert "is refused" in (session.folder / "chaos.log").read_text()
