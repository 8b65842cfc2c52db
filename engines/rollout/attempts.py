"""Batches and evaluations that are being made: one attempt at each, the newest."""

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


class Attempts:
    """What a manager is at, by (evaluation dataset, or None for a batch to train on; step)."""

    def __init__(self) -> None:
        self._running: dict[tuple[str | None, int], asyncio.Task[Any]] = {}

    async def alone(self, key: tuple[str | None, int], work: Coroutine[Any, Any, T]) -> T:
        """Do ``work``; what still runs under the same key is given up first."""
        if (before := self._running.pop(key, None)) is not None:
            before.cancel()
            await asyncio.wait({before})
        task = asyncio.create_task(work)
        self._running[key] = task
        try:
            return await task
        finally:
            if self._running.get(key) is task:
                del self._running[key]

    def cancel(self) -> None:
        """Give up everything."""
        for task in self._running.values():
            task.cancel()
