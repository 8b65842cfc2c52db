"""Servers that share a GPU fall asleep and wake, against a local server that takes its time."""

import asyncio

import aiohttp
import pytest
from aiohttp import web

from rollflow.engines.rollout.server import ServerInfo
from rollflow.engines.rollout.slot import Slot
from rollflow.engines.rollout.turns import ALL, Turns

SLOW_S = 0.1


@pytest.fixture
async def asked():
    """Paths that were asked for, and the turns of two slots: one server is up, one is not."""
    paths = []

    async def answer(request):
        paths.append(request.path)
        if request.path == "/release_memory_occupation":
            assert set((await request.json())["tags"]) == ALL
            await asyncio.sleep(SLOW_S)
        return web.json_response({})

    app = web.Application()
    app.router.add_post("/{verb}", answer)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    host, port = runner.addresses[0][:2]
    up = Slot(0, info=ServerInfo(f"http://{host}:{port}", 0, port))
    async with aiohttp.ClientSession() as session:
        yield paths, Turns(session, [up, Slot(1)])
    await runner.cleanup()


async def test_who_asks_again_waits_for_the_first_and_is_told_its_seconds(asked):
    paths, turns = asked
    first, second = await asyncio.gather(turns.sleep(), turns.sleep())
    assert first >= SLOW_S
    assert second == first
    assert paths == ["/flush_cache", "/release_memory_occupation"]


async def test_waking_waits_for_sleep_and_is_done_once(asked):
    paths, turns = asked
    await asyncio.gather(turns.sleep(), turns.wake())
    await turns.wake()
    assert paths == [
        "/flush_cache",
        "/release_memory_occupation",
        "/resume_memory_occupation",
    ]
    assert await turns.sleep() >= SLOW_S
    assert len(paths) == 5
