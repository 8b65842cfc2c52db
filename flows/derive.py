"""Runs made from other runs: continued otherwise, trained again, scored again."""

from dataclasses import dataclass, field, replace

from prefect import flow

from rollflow.storage.refs import BatchRef, RunRef
from rollflow.storage.runs import Origin
from rollflow.tasks.checkpoint import save_checkpoint
from rollflow.tasks.checks import check_hooks, check_own_mathematics, check_parallel, check_settings
from rollflow.tasks.commit import commit_step
from rollflow.tasks.derive import (
    Source,
    derive_run,
    find_source,
    replay_origin,
    rescore_batch,
)
from rollflow.tasks.engines import Engines, restore_checkpoint, running_engines
from rollflow.tasks.preflight import RunPlan, find_plan
from rollflow.tasks.recovery import from_the_log, only_writer
from rollflow.tasks.train import train_step

from .config import RunConfig
from .operation import Operation, operated
from .progress import Progress, RunSummary
from .train import train


@flow(name="fork", flow_run_name="{config.name}")
async def fork(config: RunConfig, source: str, step: int) -> RunSummary:
    """Continue ``source`` after ``step`` as a run of its own, by the settings of ``config``.

    Raises:
        ValueError: ``source`` has no checkpoint of that step.
    """
    check_settings(config)  # before the run is made: corrected settings would be other ones
    await derive_run(config, Origin("fork", source, step + 1))
    return await train.fn(config)


@flow(name="replay", flow_run_name="{config.name}")
async def replay(config: RunConfig, source: str, first: int, end: int | None) -> RunSummary:
    """Train on the stored batches of steps ``first`` to ``end - 1`` of ``source``; nothing generates.

    Checkpoints are saved where the source saved them and where ``config`` says so.

    Raises:
        ValueError: a batch is missing, or the checkpoint that ``first`` goes on from.
    """
    check_own_mathematics(config)
    check_parallel(config)
    found = await find_source(config.store, source, first, end)
    run = await derive_run(config, replay_origin(config.store, source, first))
    plan = find_plan(config, run)
    async with only_writer(config, run) as lease:
        with Progress(config, plan) as progress, operated(config) as operation:
            outcome = await from_the_log(
                config, lease, lambda plan: _replay(config, found, plan, operation, progress)
            )
            return await progress.finish(outcome)


async def _replay(
    config: RunConfig, source: Source, plan: RunPlan, operation: Operation, progress: Progress
) -> str:
    batches = [b for b in source.batches if b.step >= plan.next_step]
    if not batches:
        return "finished already"
    operation.begin(plan)
    await operation.between_steps()
    progress.show("start engines")
    async with running_engines(config, plan, rollout=False) as engines:
        await progress.time("load checkpoint", restore_checkpoint(config, plan, engines))
        for batch in batches:
            await _train_again(config, plan.run, engines, batch, progress)
            due = batch.step in source.saved_steps or config.checkpoint.due(batch.step + 1)
            last = batch is batches[-1]
            if due or last:
                save = save_checkpoint(
                    engines, config.checkpoint, config.store, plan.run, batch.step, last=last
                )
                await progress.time("checkpoint", save)
                await operation.saving(batch.step)
            if not last:
                await operation.between_steps()
    return "finished"


async def _train_again(
    config: RunConfig, run: RunRef, engines: Engines, batch: BatchRef, progress: Progress
) -> None:
    progress.begin(batch.step)
    batch = replace(batch, run=run)  # its place stays where it is
    result = await progress.time("train", train_step(engines, batch))
    record = await progress.time("commit", commit_step(config.store, batch, result))
    await progress.report(batch, record, {"perf/sync_s": 0.0})


@dataclass(frozen=True, slots=True)
class RescoreSummary:
    """What scoring again gave."""

    run: RunRef
    samples: int = 0
    changed: int = 0
    """Samples whose reward is another."""
    rewards: dict[int, tuple[float, float]] = field(default_factory=dict)
    """Mean reward before and after, by step."""


@flow(name="rescore", flow_run_name="{config.name}")
async def rescore(config: RunConfig, source: str, first: int, end: int | None) -> RescoreSummary:
    """Score the stored samples of ``source`` again by ``config.rollout.reward``, into a run of its own.

    Each sample keeps what the earlier grader said beside the new reward.

    Raises:
        ValueError: a batch is missing, or the reward function cannot be used.
    """
    check_hooks(config)
    found = await find_source(config.store, source, first, end)
    run = await derive_run(config, Origin("rescore", source, first))
    summary = RescoreSummary(run)
    async with only_writer(config, run) as lease:
        for batch in found.batches:
            again = await rescore_batch(config, lease.run, batch)
            before, after = (b.metrics.get("rollout/reward", 0.0) for b in (batch, again.batch))
            summary = replace(
                summary,
                samples=summary.samples + again.batch.rows,
                changed=summary.changed + again.changed,
                rewards={**summary.rewards, batch.step: (before, after)},
            )
    return summary
