"""Commit point B: a step is done."""

from prefect import task
from prefect.cache_policies import NO_CACHE

from rollflow.engines.megatron.actor import TrainResult
from rollflow.storage.config import StoreConfig
from rollflow.storage.objects import Store
from rollflow.storage.refs import BatchRef, StepRef
from rollflow.storage.steps import commit_step as commit


@task(name="commit step", cache_policy=NO_CACHE)
async def commit_step(store: StoreConfig, batch: BatchRef, result: TrainResult) -> StepRef:
    """Write the step's record, after everything that it speaks of."""
    metrics = {**batch.metrics, **result.metrics}
    return commit(
        Store(store),
        batch.run,
        batch.step,
        batch.digest,
        result.weights_digest,
        metrics,
        layout=result.layout,
        restored_step=result.restored_step,
    )
