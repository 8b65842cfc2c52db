"""The trainer's ranks, as the rollout engine calls them."""

import asyncio
from collections.abc import Sequence
from typing import Any

import ray

from rollflow.engines import cluster
from rollflow.engines.weights import PushResult
from rollflow.storage.samples import Sample


class Trainer:
    """Calls to all ranks. The flow calls them too: all must see its calls and these in one order."""

    def __init__(self, names: Sequence[str], namespace: str, timeout_s: float) -> None:
        """``timeout_s``: of a call, which waits for the training step that is under way; shorter than
        that of the flow's own calls, which would otherwise blame whoever waits here."""
        self._names, self._timeout_s = tuple(names), timeout_s
        self._ranks = [ray.get_actor(name, namespace=namespace) for name in names]
        several = len(names) > 1
        self._order = ray.get_actor(cluster.ORDER, namespace=namespace) if several else None

    async def push(self, urls: Sequence[str], version: int, place: str = "") -> dict[str, str]:
        """Bring the weights to servers, and publish them in ``place`` where it is given.

        Returns:
            Why servers could not be reached, by URL.

        Raises:
            RayError: these are not the weights of ``version``, or a server holds others then.
            DeadlineError: no answer in time; names the ranks.
        """
        results: list[PushResult] = await self._call("push_weights", list(urls), version, place)
        return dict(results[0].failed)

    async def load(self, url: str, version: int) -> str:
        """:meth:`push` to one server; why it could not be reached, or nothing."""
        return (await self.push([url], version)).get(url, "")

    async def loss_of(self, samples: list[Sample]) -> dict[str, float]:
        """What labelled samples cost the weights as they are. DeadlineError as of :meth:`push`."""
        return (await self._call("loss_of", ray.put(samples)))[0]

    async def _call(self, method: str, *args: object) -> list[Any]:
        try:
            async with asyncio.timeout(self._timeout_s):
                references = await cluster.hand_out(self._order, self._ranks, method, *args)
                return await asyncio.gather(*references)
        except TimeoutError:
            raise cluster.DeadlineError(
                f"waited {self._timeout_s:g} s for {method} of {', '.join(self._names)}: no answer"
            ) from None
