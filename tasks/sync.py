"""Bring the trainer's weights to the rollout servers."""

import time
from collections.abc import Mapping

from prefect import get_run_logger

from rollflow.engines import cluster

from .engines import Engines
from .grain import step_task


@step_task("sync weights")
async def sync_weights(engines: Engines, version: int) -> Mapping[str, float]:
    """Push the weights under ``version``; each server's checksum and version are compared.

    Answers in flight stop between two tokens and go on under the new weights. A server that is dead
    or silent is left to the rollout engine, which replaces it and gives it
    these weights before it serves again. Servers of others load what the trainer publishes as files.

    Returns:
        Seconds by metric: ``perf/sync_s`` of the push, its parts, and ``perf/sync_pause_s`` in which
        nothing could be generated, with the time until servers were ready for the push and that after
        it. All are 0 or missing where no server runs.
    """
    if not engines.has_servers:
        return {"perf/sync_s": 0.0}
    started, timeout_s = time.perf_counter(), engines.timeout_s
    [(urls, place)] = await cluster.call(engines.manager, "hold", version, timeout_s=timeout_s)
    held = time.perf_counter()
    results = await cluster.call(
        engines.ranks, "push_weights", urls, version, place, timeout_s=timeout_s
    )
    pushed = time.perf_counter()
    [notices] = await cluster.call(engines.manager, "release", version, timeout_s=timeout_s)
    released = time.perf_counter()
    for notice in notices:
        get_run_logger().warning(notice)
    for url, reason in results[0].failed:
        get_run_logger().warning("%s did not take version %d: %s", url, version, reason)
    return {
        **{f"perf/sync_{part}_s": seconds for part, seconds in results[0].parts.items()},
        "perf/sync_s": results[0].seconds,
        "perf/sync_hold_s": held - started,
        "perf/sync_release_s": released - pushed,
        "perf/sync_pause_s": released - started,
    }
