"""Generate a step's groups with the current weights."""

from prefect import task
from prefect.cache_policies import NO_CACHE

from rollflow.engines import cluster
from rollflow.storage.refs import GroupsRef

from .engines import Engines


@task(name="generate", cache_policy=NO_CACHE)
async def generate(engines: Engines, step: int) -> GroupsRef:
    """Sample the step's groups; scoring and writing of finished ones go on meanwhile.

    The weights that sample step ``s`` have version ``s``: they were trained ``s`` times.
    """
    [ref] = await cluster.call(engines.manager, "generate", step, step, timeout_s=engines.timeout_s)
    return ref
