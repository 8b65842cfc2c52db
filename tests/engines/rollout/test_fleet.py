"""What the fleet does about a server that ends before it was of use."""

import asyncio
from types import SimpleNamespace

import pytest

from rollflow.engines.rollout.fleet import Fleet, _Slot
from rollflow.engines.rollout.server import ServerEndedError, ServerInfo


async def test_a_server_that_ends_before_the_router_takes_it_is_named_at_once():
    async def never(url, timeout_s):
        await asyncio.get_running_loop().create_future()

    async def ended():
        return "server server-0 ended with exit code 247"

    actor = SimpleNamespace(wait_for_end=SimpleNamespace(remote=ended))
    slot = _Slot(0, actor, ServerInfo("http://127.0.0.1:1", 1, 1))
    fleet = SimpleNamespace(router=SimpleNamespace(register=never))
    with pytest.raises(ServerEndedError, match="server-0 ended with exit code 247"):
        async with asyncio.timeout(5):
            await Fleet._register(fleet, slot)  # pyright: ignore[reportArgumentType]
    assert not slot.registered
