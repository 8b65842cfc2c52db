"""What the fleet does about a server that is of no use, and about a trainer that does not answer."""

import asyncio
from types import SimpleNamespace

import pytest
import ray
from ray.exceptions import RayActorError

from rollflow.engines.cluster import DeadlineError
from rollflow.engines.rollout.fleet import Fleet, Slot
from rollflow.engines.rollout.server import ServerEndedError, ServerError, ServerInfo
from rollflow.engines.rollout.trainer import Trainer


async def test_a_server_that_ends_before_the_router_takes_it_is_named_at_once():
    async def never(url, timeout_s):
        await asyncio.get_running_loop().create_future()

    async def ended():
        return "server server-0 ended with exit code 247"

    actor = SimpleNamespace(wait_for_end=SimpleNamespace(remote=ended))
    slot = Slot(0, actor=actor, info=ServerInfo("http://127.0.0.1:1", 1, 1))
    fleet = SimpleNamespace(router=SimpleNamespace(register=never))
    with pytest.raises(ServerEndedError, match="server-0 ended with exit code 247"):
        async with asyncio.timeout(5):
            await Fleet._register(fleet, slot)  # pyright: ignore[reportArgumentType]
    assert not slot.registered


async def test_a_server_that_ends_while_it_is_given_weights_again_is_started_again():
    """The first end is of a server at work, the second of its successor, which never gets weights."""
    ends, starts = asyncio.Queue(), asyncio.Queue()

    class Dying(Fleet):
        def __init__(self):
            self._slots, self._version = [Slot(0, info=ServerInfo("http://127.0.0.1:1", 1, 1))], 3
            self.router = SimpleNamespace(unregister=self._nothing)  # pyright: ignore[reportAttributeAccessIssue]

        async def _nothing(self, url):
            pass

        async def _end_of(self, slot):
            return await ends.get()

        async def _bring_up(self, slot):
            slot.info = ServerInfo("http://127.0.0.1:2", 2, 2)
            await starts.put(slot.info)

        async def _admit_when_up(self, slot):
            await asyncio.get_running_loop().create_future()

    fleet = Dying()
    watcher = asyncio.create_task(fleet._keep(fleet._slots[0]))
    async with asyncio.timeout(5):
        for _ in range(2):
            await ends.put("ended")
            await starts.get()
    watcher.cancel()
    await asyncio.gather(watcher, return_exceptions=True)
    assert fleet._slots[0].restarts == 2


async def test_a_server_that_did_not_take_the_weights_is_named_with_the_reason():
    async def held(info):
        return "1"

    async def load(url, version):
        return "ConnectError: refused"

    fleet = SimpleNamespace(_held_version=held, load_weights=load)
    info = ServerInfo("http://127.0.0.1:1", 1, 1)
    with pytest.raises(ServerError, match=r"weights 1, version 2 is needed: ConnectError: refused"):
        await Fleet._load(fleet, info, 2)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("error", [RayActorError(), DeadlineError("no answer of trainer-0")])
async def test_a_server_does_not_wait_for_weights_of_a_trainer_that_is_gone(error):
    async def gone(slot, info):
        raise error

    async def up(slot):
        return slot.info

    slot = Slot(0, info=ServerInfo("http://127.0.0.1:1", 1, 1))
    fleet = SimpleNamespace(_when_up=up, _admit=gone, _exact=False, _version=3)
    with pytest.raises(ServerError, match="cannot get version 3 of the trainer: "):
        async with asyncio.timeout(5):
            await Fleet._admit_when_up(fleet, slot)  # pyright: ignore[reportArgumentType]


async def test_a_trainer_that_does_not_answer_is_named(monkeypatch):
    def never(*args):
        return asyncio.get_running_loop().create_future()

    rank = SimpleNamespace(push_weights=SimpleNamespace(remote=never))
    monkeypatch.setattr(ray, "get_actor", lambda name, namespace: rank)
    trainer = Trainer(["trainer-0"], "run", 0.05)
    with pytest.raises(DeadlineError, match=r"for push_weights of trainer-0: no answer"):
        await trainer.load("http://127.0.0.1:1", 2)
