"""What the fleet does about a server that ends before it was of use."""

import asyncio
from types import SimpleNamespace

import pytest

from rollflow.engines.rollout.fleet import Fleet, Slot
from rollflow.engines.rollout.server import ServerEndedError, ServerInfo


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
