"""Evaluation: of the weights in training, and of any checkpoint."""

from dataclasses import replace

from prefect import flow

from rollflow.storage.refs import BatchRef, RunRef, evaluator
from rollflow.tasks.checkpoint import checkpoint_weights
from rollflow.tasks.engines import Engines, running_engines
from rollflow.tasks.evaluate import evaluate_dataset, find_evaluation
from rollflow.tasks.events import tell_evaluated
from rollflow.tasks.preflight import preflight

from .config import RunConfig
from .progress import Progress, RunSummary


@flow(name="evaluate", flow_run_name="{config.name}")
async def evaluate(config: RunConfig, step: int | None = None) -> RunSummary:
    """Evaluate a checkpoint of a run on every dataset of ``config.evals``.

    Args:
        step: the checkpoint's step; None for the newest. A run without a checkpoint is evaluated
            with the weights at ``config.model.path``.
    """
    plan = await preflight(config)
    weights = await checkpoint_weights(config.store, plan.run, step)
    wants_trainer = any(dataset.loss for dataset in config.evals)
    if weights:
        model = config.model.model_copy(update={"path": weights.path, "random_weights": False})
        trainer = config.trainer.model_copy(update={"load": "", "ref_load": ""})
        config = config.model_copy(update={"model": model, "trainer": trainer})
    version = weights.step + 1 if weights else 0
    plan = replace(plan, run=evaluator(plan.run))  # no lease: a training may go on meanwhile
    with Progress(config, plan, f"{config.name}@{version}") as progress:
        batches = await find_evaluations(config, plan.run, version)
        if len(batches) == len(config.evals):
            progress.evaluated(version, {k: v for b in batches for k, v in b.metrics.items()})
        else:
            # The weights are the model that the engines start with, the trainer's too.
            async with running_engines(config, plan, train=wants_trainer) as engines:
                await evaluate_weights(config, plan.run, engines, version, progress, always=True)
            batches = await find_evaluations(config, plan.run, version)
        tell_evaluated(plan.run, version, batches)
        return await progress.finish("evaluated")


async def find_evaluations(config: RunConfig, run: RunRef, version: int) -> list[BatchRef]:
    """What the store holds of the evaluation of one version, by the datasets of ``config.evals``."""
    found = [await find_evaluation(config.store, run, d.name, version) for d in config.evals]
    return [batch for batch in found if batch]


async def evaluate_weights(
    config: RunConfig,
    run: RunRef,
    engines: Engines,
    version: int,
    progress: Progress,
    *,
    always: bool = False,
) -> bool:
    """Evaluate on the datasets that are due; whether ``config.stop`` is satisfied.

    ``version`` counts the steps that the weights were trained. An evaluation that the store holds
    already is read, not repeated.
    """
    metrics: dict[str, float] = {}
    for dataset in config.evals:
        if not (always or version in (0, config.steps) or dataset.due(version)):
            continue
        batch: BatchRef | None = await find_evaluation(config.store, run, dataset.name, version)
        if batch is None:
            batch = await progress.time(
                "evaluate", evaluate_dataset(engines, dataset.name, version)
            )
        metrics.update(batch.metrics)
    if config.stop and metrics and config.stop.metric not in metrics:
        known = ", ".join(sorted(metrics))
        raise ValueError(
            f"stop.metric = {config.stop.metric!r} is not evaluated; there is: {known}"
        )
    progress.evaluated(version, metrics)
    if config.stop is None or config.stop.metric not in metrics:
        return False
    return config.stop.satisfied(metrics[config.stop.metric])
