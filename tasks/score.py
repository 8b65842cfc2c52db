"""Score what was generated."""

from rollflow.engines import cluster
from rollflow.storage.refs import GroupsRef

from .engines import Engines
from .grain import step_task


@step_task("score")
async def score(engines: Engines, groups: GroupsRef) -> GroupsRef:
    """Wait for the graders that still run; most finished while others were generating."""
    [ref] = await cluster.call(engines.manager, "score", groups, timeout_s=engines.timeout_s)
    return ref
