"""Evaluate the weights that the servers hold."""

from collections.abc import Collection

from prefect import task
from prefect.cache_policies import NO_CACHE

from rollflow.engines import cluster
from rollflow.storage.config import StoreConfig
from rollflow.storage.manifests import batch_steps, dataset_names, find_batch
from rollflow.storage.objects import Store
from rollflow.storage.refs import BatchRef, RunRef

from .engines import Engines


async def find_evaluation(
    store: StoreConfig, run: RunRef, dataset: str, version: int
) -> BatchRef | None:
    """The stored evaluation of the weights that were trained ``version`` steps, if there is one."""
    return find_batch(Store(store), run, version, dataset)


def stored_evaluations(
    store: StoreConfig, run: RunRef, known: Collection[tuple[str, int]] = ()
) -> dict[int, dict[str, float]]:
    """Metrics of every committed evaluation, by the number of steps that the weights were trained.

    Those of ``known`` datasets and versions are not read.
    """
    opened, found = Store(store), dict[int, dict[str, float]]()
    for dataset in dataset_names(opened, run):
        for version in batch_steps(opened, run, dataset):
            if (dataset, version) in known:
                continue
            if batch := find_batch(opened, run, version, dataset):
                found.setdefault(version, {}).update(batch.metrics)
    return dict(sorted(found.items()))


@task(name="evaluate", task_run_name="evaluate {dataset}", cache_policy=NO_CACHE)
async def evaluate_dataset(engines: Engines, dataset: str, version: int) -> BatchRef:
    """Answer and score every prompt of a dataset; stored like a batch, under ``evals/``."""
    [batch] = await cluster.call(
        engines.manager, "evaluate", dataset, version, version, timeout_s=engines.timeout_s
    )
    return batch
