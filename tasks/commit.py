"""Commit point B: a step is done."""

from rollflow.engines.megatron.actor import TrainResult
from rollflow.storage.config import StoreConfig
from rollflow.storage.objects import Store
from rollflow.storage.refs import BatchRef, StepRef
from rollflow.storage.steps import commit_step as commit

from .grain import step_task


@step_task("commit step")
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
        functions=result.functions,
    )
