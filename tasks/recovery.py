"""One writer per run, and what happens when an engine is lost: go on from the log."""

import asyncio
import os
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from prefect import get_run_logger
from ray.exceptions import RayError

from rollflow.engines.cluster import DeadlineError, EngineDiedError
from rollflow.engines.rollout.client import GenerationError
from rollflow.engines.rollout.server import ServerError
from rollflow.storage import lease as leases
from rollflow.storage.lease import Lease
from rollflow.storage.leftovers import clear_leftovers
from rollflow.storage.objects import Store
from rollflow.storage.refs import RunRef
from rollflow.storage.steps import last_step

from .preflight import RunPlan, find_plan
from .settings import RunSettings

T = TypeVar("T")
LOST_ENGINE = (EngineDiedError, DeadlineError, ServerError, GenerationError, RayError)
"""Faults of processes and machines. A gate or a damaged log is none: trying again cannot help."""


@contextmanager
def only_writer(config: RunSettings, run: RunRef) -> Iterator[Lease]:
    """Hold the run's lease, renewed from a thread.

    Raises:
        LeaseHeldError: another flow writes this run; names holder, host and until when.
    """
    holder = f"{config.name} (pid {os.getpid()})"
    with leases.kept(
        leases.acquire(Store(config.store), run, holder, config.cluster.lease_s)
    ) as lease:
        yield lease


async def from_the_log(
    config: RunSettings, lease: Lease, work: Callable[[RunPlan], Awaitable[T]]
) -> T:
    """Do ``work`` from where the run stands; when an engine is lost, again from where it stands then.

    Each attempt has a fencing epoch of its own, so that what is left of the one before can neither
    train nor commit. A committed step makes the count of attempts start anew.

    Raises:
        One of ``LOST_ENGINE``: ``cluster.max_recoveries`` attempts in a row committed no step.
    """
    store, failures, reached = Store(config.store), 0, -1
    while True:
        await asyncio.to_thread(clear_leftovers, store, lease.run)
        plan = await asyncio.to_thread(find_plan, config, lease.run)
        try:
            return await work(plan)
        except LOST_ENGINE as error:
            newest = last_step(store, lease.run)
            committed = newest.step if newest else -1
            failures = 1 if committed > reached else failures + 1
            reached = max(reached, committed)
            if failures > config.cluster.max_recoveries:
                raise
            get_run_logger().warning("going on from step %d of the log: %s", committed + 1, error)
            print(
                f"{config.name}: {error}; going on from the log ({failures} of {config.cluster.max_recoveries})"
            )
            lease.advance()
