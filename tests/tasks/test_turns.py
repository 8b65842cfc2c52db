"""In which order trainer and servers have the GPU that they share."""

import time

import pytest

from rollflow.engines import cluster
from rollflow.engines.cluster import NULL, ClusterRef
from rollflow.engines.megatron.actor import TrainResult
from rollflow.storage.refs import BatchRef, GroupsRef, RunRef
from rollflow.tasks.engines import Engines
from rollflow.tasks.grain import told
from rollflow.tasks.train import train_step
from rollflow.tasks.write import write_batch

RUN = RunRef("a", "memory://a", 1)
BATCH = BatchRef(RUN, 0, "memory://a/b", 1, 1, "digest", {})


class Parts:
    """Verbs of manager and rank, written down as they begin and end."""

    def __init__(self, events):
        self.events = events

    def _at(self, name, result=None):
        self.events.append(f"{name}...")
        time.sleep(0.05)
        self.events.append(name)
        return result

    def write(self, groups):
        return self._at("write", BATCH)

    def sleep(self):
        return self._at("sleep", 0.25)

    def wake(self):
        self._at("wake")

    def update(self, batch):
        self._at("update")

    def train(self, batch):
        return self._at("train", TrainResult({"train/loss": 0.5}, "ab12", 1))


@pytest.fixture
def events():
    found = []
    for name in ("rollout", "trainer-0"):
        cluster.start_here(Parts, name, found)
    yield found
    cluster._here.clear()


def engines(*, take_turns):
    ref = ClusterRef(NULL, "a", "")
    return Engines(ref, ("trainer-0",), "rollout", 5.0, has_servers=True, take_turns=take_turns)


async def test_servers_fall_asleep_while_the_batch_is_written(events):
    with told(False):
        batch = await write_batch(engines(take_turns=True), GroupsRef(RUN, 0, 1, 1, 0))
    assert batch == BATCH
    assert sorted(events[:2]) == ["sleep...", "write..."]


async def test_servers_sleep_while_there_is_an_update_and_wake_beside_its_digest(events):
    with told(False):
        result = await train_step(engines(take_turns=True), BATCH)
    assert events[:4] == ["sleep...", "sleep", "update...", "update"]
    assert sorted(events[4:6]) == ["train...", "wake..."]
    assert result.metrics == {"train/loss": 0.5, "perf/sleep_s": 0.25}


async def test_servers_with_a_gpu_of_their_own_are_left_alone(events):
    with told(False):
        await write_batch(engines(take_turns=False), GroupsRef(RUN, 0, 1, 1, 0))
        result = await train_step(engines(take_turns=False), BATCH)
    assert events == ["write...", "write", "train...", "train"]
    assert result.metrics == {"train/loss": 0.5}
