"""Generate a step's groups with the current weights."""

from rollflow.engines import cluster
from rollflow.storage.refs import GroupsRef

from .engines import Engines
from .grain import step_task


@step_task("generate")
async def generate(engines: Engines, step: int, version: int) -> GroupsRef:
    """Sample and score the step's groups; writing of finished ones goes on meanwhile.

    ``version`` is that of the weights which the servers hold now: they were trained so many times.
    """
    [ref] = await cluster.call(
        engines.manager, "generate", step, version, timeout_s=engines.timeout_s
    )
    return ref
