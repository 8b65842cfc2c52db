"""Generation without training: samples for later, stored and scored like any batch."""

from dataclasses import dataclass, field

from prefect import flow

from rollflow.storage.objects import Store
from rollflow.storage.refs import BatchRef, RunRef
from rollflow.storage.runs import Origin, open_run
from rollflow.tasks.checkpoint import checkpoint_weights
from rollflow.tasks.checks import check_generation
from rollflow.tasks.engines import Engines, running_engines
from rollflow.tasks.generate import generate
from rollflow.tasks.preflight import RunPlan, preflight
from rollflow.tasks.recovery import from_the_log, only_writer
from rollflow.tasks.score import score
from rollflow.tasks.write import find_batch, write_batch

from .config import RunConfig


@dataclass(frozen=True, slots=True)
class RolloutSummary:
    """What was generated."""

    run: RunRef
    batches: list[BatchRef] = field(default_factory=list)


@flow(name="rollout", flow_run_name="{config.name}")
async def rollout(config: RunConfig, weights_of: str, step: int | None) -> RolloutSummary:
    """Generate and score ``config.steps`` batches with weights that do not change.

    Args:
        weights_of: the run whose checkpoint generates; empty for the weights at ``model.path``.
        step: the checkpoint's step; None for the newest.
    """
    details: dict[str, object] = {"weights": config.model.path}
    if weights_of:
        config, details = await _with_weights(config, weights_of, step)
    origin = Origin("rollout", weights_of, details=details)
    check_generation(config)
    plan = await preflight(config, origin)
    async with only_writer(config, plan.run) as lease:
        batches = await from_the_log(config, lease, lambda plan: _generate(config, plan))
    return RolloutSummary(plan.run, batches)


async def _with_weights(
    config: RunConfig, run: str, step: int | None
) -> tuple[RunConfig, dict[str, object]]:
    weights = await checkpoint_weights(config.store, open_run(Store(config.store), run), step)
    if weights is None:
        raise ValueError(
            f"run {run!r} has no checkpoint yet; generate without it, or train it first"
        )
    model = config.model.model_copy(update={"path": weights.path, "random_weights": False})
    return config.model_copy(update={"model": model}), {"weights": f"step {weights.step} of {run}"}


async def _generate(config: RunConfig, plan: RunPlan) -> list[BatchRef]:
    found = [await find_batch(config.store, plan.run, step) for step in range(config.steps)]
    if all(found):
        return [batch for batch in found if batch]
    async with running_engines(config, plan, train=False) as engines:
        return [
            batch or await _one_batch(engines, step, config.name)
            for step, batch in enumerate(found)
        ]


async def _one_batch(engines: Engines, step: int, name: str) -> BatchRef:
    batch = await write_batch(engines, await score(engines, await generate(engines, step, 0)))
    reward = batch.metrics.get("rollout/reward")
    shown = "" if reward is None else f", reward {reward:.3f}"
    print(f"{name}: step {step}: {batch.rows} samples{shown}", flush=True)
    return batch
