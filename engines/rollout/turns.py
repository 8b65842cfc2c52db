"""Servers that share their GPU with a trainer rank, by turns with it."""

import asyncio
import time
from collections.abc import Sequence

import aiohttp

from .slot import CUDA_GRAPH, KV_CACHE, WEIGHTS, Slot, sleep, wake

ALL = {WEIGHTS, KV_CACHE, CUDA_GRAPH}


class Turns:
    """Puts the servers of ``slots`` to sleep and wakes them; both may be asked for again meanwhile."""

    def __init__(self, session: aiohttp.ClientSession, slots: Sequence[Slot]) -> None:
        self._session, self._slots = session, slots
        self._one = asyncio.Lock()
        self._sleep_s = 0.0

    async def sleep(self) -> float:
        """Give the GPU's memory back: weights, keys and values, graphs. What they held is lost.

        Nothing may be in flight. ServerError names a server that does not come to rest.

        Returns:
            Seconds that this took since they woke, also where they slept already.
        """
        async with self._one:
            started = time.perf_counter()
            await asyncio.gather(*(sleep(self._session, s, ALL) for s in self._slots if s.info))
            self._sleep_s = max(self._sleep_s, time.perf_counter() - started)
            return self._sleep_s

    async def wake(self) -> None:
        """Take the memory back; weights have to be loaded then."""
        async with self._one:
            await asyncio.gather(*(wake(self._session, s, ALL) for s in self._slots if s.info))
            self._sleep_s = 0.0
