"""The training of a policy, told as a workflow."""

from prefect import flow

from rollflow.tasks.checkpoint import save_checkpoint
from rollflow.tasks.checks import check_generation
from rollflow.tasks.engines import restore_checkpoint, running_engines
from rollflow.tasks.preflight import RunPlan, preflight
from rollflow.tasks.recovery import from_the_log, only_writer
from rollflow.tasks.restarts import refuse_crash_loop
from rollflow.tasks.sync import sync_weights

from .config import RunConfig
from .evaluate import evaluate_weights
from .iteration import iteration
from .operation import Operation, operated
from .production import Production
from .progress import Progress, RunSummary


@flow(name="train", flow_run_name="{config.name}")
async def train(config: RunConfig) -> RunSummary:
    """Train for ``config.steps`` steps, from wherever this run last committed."""
    check_generation(config)
    plan = await preflight(config)  # every mistake shows here, before an engine starts
    await refuse_crash_loop(config.name, config.cluster.max_recoveries, (config.store, plan.run))
    async with only_writer(config, plan.run) as lease:
        with Progress(config, plan) as progress, operated(config) as operation:
            outcome = await from_the_log(
                config, lease, lambda plan: _train(config, plan, operation, progress)
            )
            return await progress.finish(outcome)


@flow(name="sft", flow_run_name="{config.name}")
async def sft(config: RunConfig) -> RunSummary:
    """Supervised fine-tuning: the same loop, with the labels as answers."""
    if config.algorithm.name != "sft":
        raise ValueError(
            f"algorithm.name = {config.algorithm.name!r} in the sft flow; set it to 'sft', or use train"
        )
    return await train.fn(config)


async def _train(config: RunConfig, plan: RunPlan, operation: Operation, progress: Progress) -> str:
    """Train from ``plan`` to the end; how it ended."""
    operation.begin(plan)
    await operation.between_steps()
    if plan.next_step >= config.steps:
        trained = f"{plan.next_step} steps are trained, steps = {config.steps}"
        return f"finished already ({trained}; a larger one goes on)"
    progress.show("start engines")
    async with running_engines(config, plan) as engines:
        await progress.time("load checkpoint", restore_checkpoint(config, plan, engines))
        await progress.time("sync", sync_weights(engines, plan.next_step))
        if await evaluate_weights(config, plan.run, engines, plan.next_step, progress):
            return "good enough already"
        good_enough = False
        async with Production(config, plan.run, engines, progress) as production:
            for step in range(plan.next_step, config.steps):
                await iteration(config, production, engines, step, progress)
                good_enough = await evaluate_weights(config, plan.run, engines, step + 1, progress)
                last, suspended = good_enough or step + 1 == config.steps, operation.is_last()
                due = suspended or config.checkpoint.due(step + 1)
                if due or (last and config.checkpoint.last):
                    saved = save_checkpoint(
                        engines, config.checkpoint, config.store, plan.run, step,
                        last=last or suspended,
                    )  # fmt: skip
                    await progress.time("checkpoint", saved)
                    await operation.saving(step)
                if last:
                    break
                await operation.between_steps()
        return "stopped early" if good_enough else "finished"
