"""Score what was generated."""

from prefect import task
from prefect.cache_policies import NO_CACHE

from rollflow.engines import cluster
from rollflow.storage.refs import GroupsRef

from .engines import Engines


@task(name="score", cache_policy=NO_CACHE)
async def score(engines: Engines, groups: GroupsRef) -> GroupsRef:
    """Wait for the graders that still run; most finished while others were generating."""
    [ref] = await cluster.call(engines.manager, "score", groups, timeout_s=engines.timeout_s)
    return ref
