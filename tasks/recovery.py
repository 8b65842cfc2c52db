"""One writer per run, and what happens when an engine is lost: go on from the log."""

import asyncio
import hashlib
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from typing import TypeVar

from prefect import get_client, get_run_logger
from prefect.concurrency.asyncio import AcquireConcurrencySlotTimeoutError, concurrency
from prefect.exceptions import ObjectAlreadyExists

from rollflow.engines.cluster import DeadlineError
from rollflow.storage import lease as leases
from rollflow.storage.lease import Lease
from rollflow.storage.leftovers import clear_leftovers
from rollflow.storage.objects import Store
from rollflow.storage.refs import RunRef
from rollflow.storage.steps import last_step

from .engines import LOST_ENGINE, StartError
from .preflight import RunPlan, find_plan
from .settings import RunSettings

T = TypeVar("T")
SHORTEST_SLOT_S = 60.0
MAX_FAILED_STARTS = 2
"""Starts that may fail in a row: what is wrong then is no accident."""


@asynccontextmanager
async def only_writer(config: RunSettings, run: RunRef) -> AsyncIterator[Lease]:
    """Hold the run's lease, renewed from a thread.

    A store that ignores conditional puts cannot decide between two flows that start in the same
    instant: there a concurrency limit of the Prefect server, one slot a run, is held as well.

    Raises:
        LeaseHeldError: another flow writes this run; names holder, host and until when.
        DeadlineError: the run's slot in Prefect was not free in time; names the limit.
    """
    store = Store(config.store)
    holder = f"{config.name} (pid {os.getpid()})"
    leases.check_free(store, run)
    async with AsyncExitStack() as held:
        if not leases.probe_conditional_puts(store):
            await held.enter_async_context(_slot(run, config.cluster.lease_s))
        lease = leases.acquire(store, run, holder, config.cluster.lease_s)
        yield held.enter_context(leases.kept(lease))


@asynccontextmanager
async def _slot(run: RunRef, lease_s: float) -> AsyncIterator[None]:
    """The one slot of the run's concurrency limit, kept by renewal; a dead holder's expires."""
    name = slot_name(run)
    _say(
        f"{run.name}: {run.url} ignores conditional puts; the Prefect concurrency limit {name!r} "
        "keeps a second flow from starting"
    )
    async with get_client() as client:
        with suppress(ObjectAlreadyExists):  # another flow made it just now
            await client.upsert_global_concurrency_limit_by_name(name, 1)
    slot_s = max(SHORTEST_SLOT_S, lease_s)  # Prefect accepts no shorter one
    wait_s = 1.5 * slot_s
    try:
        async with concurrency(name, timeout_seconds=wait_s, lease_duration=slot_s, strict=True):
            yield
    except AcquireConcurrencySlotTimeoutError as error:
        raise DeadlineError(
            f"waited {wait_s:.0f} s for the one slot of the Prefect concurrency limit {name!r}: "
            f"another flow writes run {run.name!r}; wait for it, stop it, or give this run another name"
        ) from error


def slot_name(run: RunRef) -> str:
    """Name of the concurrency limit of a run: one for each store and name."""
    digest = hashlib.sha256(run.url.encode()).hexdigest()[:12]
    return f"rollflow-writer-{run.name}-{digest}"


def _say(text: str) -> None:
    get_run_logger().warning(text)
    print(text)


async def from_the_log(
    config: RunSettings, lease: Lease, work: Callable[[RunPlan], Awaitable[T]]
) -> T:
    """Do ``work`` from where the run stands; when an engine is lost, again from where it stands then.

    Each attempt has a fencing epoch of its own, so that what is left of the one before can neither
    train nor commit. A committed step makes the count of attempts start anew.

    Raises:
        One of ``LOST_ENGINE``: ``cluster.max_recoveries`` attempts in a row committed no step.
        StartError: the engines did not come up, twice in a row.
    """
    store, failures, reached, failed_starts = Store(config.store), 0, -1, 0
    while True:
        await asyncio.to_thread(clear_leftovers, store, lease.run)
        plan = await asyncio.to_thread(find_plan, config, lease.run)
        for damage in plan.damaged:
            _say(
                f"{config.name}: a damaged checkpoint is not used: {damage}; the run goes on from an "
                f"older one, step {plan.next_step}, and its log"
            )
        try:
            return await work(plan)
        except (*LOST_ENGINE, StartError) as error:
            failed_starts = failed_starts + 1 if isinstance(error, StartError) else 0
            newest = last_step(store, lease.run)
            committed = newest.step if newest else -1
            failures = 1 if committed > reached else failures + 1
            reached = max(reached, committed)
            if failures > config.cluster.max_recoveries or failed_starts == MAX_FAILED_STARTS:
                raise
            _say(
                f"{config.name}: {error}; going on from step {committed + 1} of the log "
                f"({failures} of {config.cluster.max_recoveries})"
            )
            lease.advance()
