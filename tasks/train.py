"""Train on a committed batch."""

import asyncio
from collections.abc import Awaitable
from dataclasses import replace
from typing import Any

from rollflow.engines import cluster
from rollflow.engines.megatron.actor import TrainResult
from rollflow.storage.refs import BatchRef

from .engines import Engines
from .grain import step_task


@step_task("train step")
async def train_step(engines: Engines, batch: BatchRef) -> TrainResult:
    """Every rank reads its share of the batch from the store and takes part in the update.

    Servers on the same GPU sleep while there is an update, and wake while its digest is computed; they
    have no weights until they are given the new ones.

    Raises:
        GateError: trainer and rollout disagree about log-probabilities, or the first ratio is not 1.
        RuntimeError: ranks ended with different weights.
    """
    timeout_s = engines.timeout_s
    asleep: dict[str, float] = {}
    waking: list[Awaitable[list[Any]]] = []
    if engines.take_turns:
        [seconds] = await cluster.call(engines.manager, "sleep", timeout_s=timeout_s)
        asleep = {"perf/sleep_s": seconds}
        await cluster.call(engines.ranks, "update", batch, timeout_s=timeout_s)
        waking = [cluster.call(engines.manager, "wake", timeout_s=timeout_s)]
    train = cluster.call(engines.ranks, "train", batch, timeout_s=timeout_s)
    results, *_ = await asyncio.gather(train, *waking)
    if len({r.weights_digest for r in results}) > 1:
        digests = ", ".join(
            f"{n}: {r.weights_digest[:12]}" for n, r in zip(engines.ranks, results, strict=True)
        )
        raise RuntimeError(
            f"step {batch.step}: the ranks' weights differ after training ({digests})"
        )
    return replace(results[0], metrics=results[0].metrics | asleep)
