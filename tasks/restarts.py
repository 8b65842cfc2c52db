"""A flow run that is started again and again without committing a step is not started for ever."""

from datetime import datetime

from prefect import get_client
from prefect.client.schemas.objects import StateType
from prefect.context import FlowRunContext

from rollflow.storage.config import StoreConfig
from rollflow.storage.objects import Store
from rollflow.storage.refs import RunRef
from rollflow.storage.steps import last_step, read_step

CRASHES = (StateType.CRASHED, StateType.SCHEDULED)
"""Their messages say what a flow died of: a worker saw it end, or nothing was heard of it."""
LIMIT = 5
"""Of flows that commit no steps."""


class CrashLoopError(RuntimeError):
    """A flow run crashed too often in a row; the message says how often and what to do."""


async def refuse_crash_loop(
    name: str, limit: int = LIMIT, progress: tuple[StoreConfig, RunRef] | None = None
) -> None:
    """Count how often this flow run was started again; with ``progress``, since that run's newest step.

    Raises:
        CrashLoopError: more than ``limit``. It makes the flow run fail, which, unlike a crash, nothing
            starts again by itself.
    """
    context = FlowRunContext.get()
    if context is None or context.flow_run is None or context.flow_run.run_count < 2:
        return
    async with get_client() as client:
        states = await client.read_flow_run_states(context.flow_run.id)
    since = _newest_commit(*progress) if progress else None
    starts = [s.timestamp for s in states if s.type == StateType.RUNNING]
    again = [start for start in starts[1:] if since is None or start > since]
    if len(again) > limit:
        crashes = [s.message for s in states if s.message and s.type in CRASHES]
        raise CrashLoopError(
            f"{name}: started again {len(again)} times in a row without a new step, last: "
            f"{crashes[-1] if crashes else 'by hand'}; mend the cause, then retry this flow run: it goes "
            f"on from what it committed (cluster.max_recoveries of a training, else {LIMIT}, says how often it is tried)"
        )


def _newest_commit(config: StoreConfig, run: RunRef) -> datetime | None:
    store = Store(config)
    newest = last_step(store, run)
    return (
        datetime.fromisoformat(read_step(store, run, newest.step).committed_at) if newest else None
    )
