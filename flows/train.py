"""The training of a policy, told as a workflow."""

from prefect import flow

from rollflow.tasks.checkpoint import save_checkpoint
from rollflow.tasks.engines import running_engines
from rollflow.tasks.preflight import preflight
from rollflow.tasks.sync import sync_weights

from .config import RunConfig
from .evaluate import evaluate_weights
from .iteration import iteration
from .progress import Progress, RunSummary


@flow(name="train", flow_run_name="{config.name}")
async def train(config: RunConfig) -> RunSummary:
    """Train for ``config.steps`` steps, from wherever this run last committed."""
    plan = await preflight(config)  # every mistake shows here, before an engine starts
    with Progress(config, plan) as progress:
        if plan.next_step >= config.steps:
            return progress.summary("finished already")
        async with running_engines(config, plan) as engines:
            await sync_weights(engines, plan.next_step)
            await evaluate_weights(config, plan.run, engines, plan.next_step, progress)
            good_enough = False
            for step in range(plan.next_step, config.steps):
                await iteration(config, plan.run, engines, step, progress)
                good_enough = await evaluate_weights(config, plan.run, engines, step + 1, progress)
                last = good_enough or step + 1 == config.steps
                if last or config.checkpoint.due(step + 1):
                    await progress.time(
                        "checkpoint", save_checkpoint(engines, config.checkpoint, step)
                    )
                if last:
                    break
        return progress.summary("stopped early" if good_enough else "finished")


@flow(name="sft", flow_run_name="{config.name}")
async def sft(config: RunConfig) -> RunSummary:
    """Supervised fine-tuning: the same loop, with the labels as answers."""
    if config.algorithm.name != "sft":
        raise ValueError(
            f"algorithm.name = {config.algorithm.name!r} in the sft flow; set it to 'sft', or use train"
        )
    return await train.fn(config)
