"""What the fleet knows of one server of its own, and how that gives its GPU's memory back."""

import asyncio
from collections.abc import Mapping, Set
from dataclasses import dataclass, field
from typing import Any

import aiohttp

from .server import POLL_S, ServerError, ServerInfo

WEIGHTS, KV_CACHE, CUDA_GRAPH = "weights", "kv_cache", "cuda_graph"
"""SGLang's tags of what a server can give back to the GPU."""
IDLE_TIMEOUT_S = 60.0
"""Seconds that a server may take to put away its last answers before it sleeps."""


@dataclass(slots=True)
class Slot:
    """One server: up, being started again, or given up."""

    index: int
    name: str = "server"
    table: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """SGLang's arguments that the settings give it."""
    actor: Any = None
    """Ray handle of the ServerActor."""
    info: ServerInfo | None = None
    """None while the server is down."""
    admitted: bool = False
    registered: bool = False
    asleep: set[str] = field(default_factory=set[str])
    """Tags of what the server has given back."""
    restarts: int = 0
    error: BaseException | None = None
    """Set when the server is given up."""
    watcher: asyncio.Task[None] | None = None
    admission: asyncio.Task[None] | None = None
    """Gives a server that was started again the weights, while it is watched already."""
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)


async def send(session: aiohttp.ClientSession, method: str, url: str, body: object = None) -> Any:
    """One control request; what it answers in JSON. aiohttp.ClientError where it is refused."""
    async with session.request(method, url, json=body) as response:
        response.raise_for_status()
        return await response.json() if response.content_type == "application/json" else None


async def sleep(session: aiohttp.ClientSession, slot: Slot, tags: Set[str]) -> None:
    """Give back what ``tags`` name; what it held is lost. ServerError where it does not come to rest."""
    assert slot.info is not None
    url, due = slot.info.url, sorted(tags - slot.asleep)
    if not due:
        return
    try:
        async with asyncio.timeout(IDLE_TIMEOUT_S):
            while not await _is_idle(session, url):
                await asyncio.sleep(POLL_S)
        await send(session, "POST", f"{url}/release_memory_occupation", {"tags": due})
    except aiohttp.ClientConnectionError:
        return  # it has just died: the watcher starts it again
    except TimeoutError as error:
        raise ServerError(
            f"{slot.name} still works on requests {IDLE_TIMEOUT_S:.0f} s after the last answer"
        ) from error
    slot.asleep |= tags


async def wake(session: aiohttp.ClientSession, slot: Slot, tags: Set[str]) -> None:
    """Take back what ``tags`` name."""
    assert slot.info is not None
    if due := sorted(tags & slot.asleep):
        try:
            url = f"{slot.info.url}/resume_memory_occupation"
            await send(session, "POST", url, {"tags": due})
        except aiohttp.ClientConnectionError:
            return  # it has just died: the watcher starts it again
        slot.asleep -= tags


async def _is_idle(session: aiohttp.ClientSession, url: str) -> bool:
    """Whether the server has put its last answer away; it then has nothing in its caches."""
    async with session.post(f"{url}/flush_cache") as response:
        return response.status == 200
