"""Evaluate the weights that the servers hold."""

from prefect import task
from prefect.cache_policies import NO_CACHE

from rollflow.engines import cluster
from rollflow.storage.refs import BatchRef

from .engines import Engines


@task(name="evaluate", task_run_name="evaluate {dataset}", cache_policy=NO_CACHE)
async def evaluate_dataset(engines: Engines, dataset: str, version: int) -> BatchRef:
    """Answer and score every prompt of a dataset; stored like a batch, under ``evals/``."""
    [batch] = await cluster.call(
        engines.manager, "evaluate", dataset, version, version, timeout_s=engines.timeout_s
    )
    return batch
