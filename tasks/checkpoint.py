"""Save weights and optimizer."""

from prefect import task
from prefect.cache_policies import NO_CACHE

from rollflow.engines import cluster
from rollflow.engines.megatron.config import CheckpointConfig
from rollflow.storage.refs import CheckpointRef

from .engines import Engines


@task(name="save checkpoint", cache_policy=NO_CACHE)
async def save_checkpoint(engines: Engines, config: CheckpointConfig, step: int) -> CheckpointRef:
    """Write torch_dist shards, Hugging Face weights where asked for, and last the manifest."""
    refs = await cluster.call(engines.ranks, "save", step, config.hf, timeout_s=engines.timeout_s)
    return refs[0]
