"""The trainer's ranks, as the rollout engine calls them."""

import asyncio
from collections.abc import Sequence
from typing import Any

import ray

from rollflow.engines import cluster
from rollflow.storage.samples import Sample


class Trainer:
    """Calls to all ranks. The flow calls them too: all must see its calls and these in one order."""

    def __init__(self, names: Sequence[str], namespace: str) -> None:
        self._ranks = [ray.get_actor(name, namespace=namespace) for name in names]
        several = len(names) > 1
        self._order = ray.get_actor(cluster.ORDER, namespace=namespace) if several else None

    async def push(self, urls: Sequence[str], version: int, place: str = "") -> None:
        """Bring the weights to servers, and publish them in ``place`` where it is given.

        RayError where these are not the weights of ``version``, or a server holds others then.
        """
        await self._call("push_weights", list(urls), version, place)

    async def loss_of(self, samples: list[Sample]) -> dict[str, float]:
        """What labelled samples cost the weights as they are."""
        return (await self._call("loss_of", ray.put(samples)))[0]

    async def _call(self, method: str, *args: object) -> list[Any]:
        references = await cluster.hand_out(self._order, self._ranks, method, *args)
        return await asyncio.gather(*references)
