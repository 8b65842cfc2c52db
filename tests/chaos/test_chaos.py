"""A seeded few of the kills that ``make chaos`` does many of."""

import pytest

from .harness import PHASES, VICTIMS, plan
from .run import run_sessions

pytestmark = pytest.mark.slow


def test_the_schedule_is_the_same_for_the_same_seed_and_covers_every_pair():
    schedule = plan(3, len(VICTIMS) * len(PHASES))
    assert schedule == plan(3, len(VICTIMS) * len(PHASES))
    assert len({(kill.process, kill.phase) for kill in schedule}) == len(VICTIMS) * len(PHASES)


@pytest.mark.timeout(900)
def test_a_killed_run_ends_with_the_weights_of_a_run_that_nobody_killed(tmp_path):
    # Of this seed the first three kills are of a server, the flow and a trainer, in three phases.
    rows = run_sessions(tmp_path, seed=67, kills=3, per_session=3, parallel=2, engines=1)
    for row in rows:
        assert row.recovered, row
        assert row.digest_equal, row
        assert row.lost == 0, row
        assert row.note == "", row
