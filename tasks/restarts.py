"""A flow run that crashes again and again without committing a step is not started for ever."""

from datetime import datetime

from prefect import get_client
from prefect.client.schemas.objects import StateType
from prefect.context import FlowRunContext

from rollflow.storage.objects import Store
from rollflow.storage.refs import RunRef
from rollflow.storage.steps import last_step, read_step

from .settings import RunSettings


class CrashLoopError(RuntimeError):
    """A flow run crashed too often in a row; the message says how often and what to do."""


async def refuse_crash_loop(config: RunSettings, run: RunRef) -> None:
    """Count this flow run's crashes since the newest step was committed.

    Raises:
        CrashLoopError: more than ``cluster.max_recoveries``. It makes the flow run fail, which,
            unlike a crash, nothing starts again by itself.
    """
    context = FlowRunContext.get()
    if context is None or context.flow_run is None or context.flow_run.run_count < 2:
        return
    async with get_client() as client:
        states = await client.read_flow_run_states(context.flow_run.id)
    store = Store(config.store)
    newest = last_step(store, run)
    since = datetime.fromisoformat(read_step(store, run, newest.step).committed_at) if newest else 0
    crashes = [
        s for s in states if s.type == StateType.CRASHED and (not since or s.timestamp > since)
    ]
    if len(crashes) > config.cluster.max_recoveries:
        raise CrashLoopError(
            f"{config.name}: crashed {len(crashes)} times in a row without committing a step, "
            f"last: {crashes[-1].message}; mend the cause, then retry this flow run: it goes on from "
            "the log (cluster.max_recoveries says how many times in a row it is tried)"
        )
