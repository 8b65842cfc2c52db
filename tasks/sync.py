"""Bring the trainer's weights to the rollout servers."""

from prefect import get_run_logger

from rollflow.engines import cluster

from .engines import Engines
from .grain import step_task


@step_task("sync weights")
async def sync_weights(engines: Engines, version: int) -> float:
    """Push the weights under ``version``; each server's checksum and version are compared.

    Answers in flight stop between two tokens and go on under the new weights. A server that is dead
    or silent is left to the rollout engine, which replaces it and gives it
    these weights before it serves again. Servers of others load what the trainer publishes as files.

    Returns:
        Seconds that the push took; 0 where no server runs.
    """
    if not engines.has_servers:
        return 0.0
    timeout_s = engines.timeout_s
    [(urls, place)] = await cluster.call(engines.manager, "hold", version, timeout_s=timeout_s)
    results = await cluster.call(
        engines.ranks, "push_weights", urls, version, place, timeout_s=timeout_s
    )
    [notices] = await cluster.call(engines.manager, "release", version, timeout_s=timeout_s)
    for notice in notices:
        get_run_logger().warning(notice)
    for url, reason in results[0].failed:
        get_run_logger().warning("%s did not take version %d: %s", url, version, reason)
    return results[0].seconds
