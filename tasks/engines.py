"""Start and stop the engines of a run: named Ray actors that outlive any one task."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from prefect import task
from prefect.cache_policies import NO_CACHE

from rollflow.engines import cluster
from rollflow.engines.megatron.actor import TrainerRank
from rollflow.engines.platform import Platform, detect
from rollflow.engines.rollout.manager import RolloutManager

from .preflight import RunPlan
from .settings import RunSettings

MANAGER = "rollout"


@dataclass(frozen=True, slots=True)
class Engines:
    """The engines of a run, by name. Pass it on; only tasks look inside."""

    cluster: cluster.ClusterRef
    ranks: tuple[str, ...]
    """Trainer actors in the order of their ranks; empty where nothing is trained."""
    manager: str
    timeout_s: float
    """Deadline of one call."""
    has_servers: bool


@asynccontextmanager
async def running_engines(
    config: RunSettings, plan: RunPlan, *, train: bool = True
) -> AsyncIterator[Engines]:
    """The engines, up and holding the same weights; stopped on the way out, whatever happened."""
    ref = cluster.connect(config.cluster, plan.run.name)
    engines = Engines(
        cluster=ref,
        ranks=tuple(f"trainer-{r}" for r in range(config.trainer.ranks)) if train else (),
        manager=MANAGER,
        timeout_s=config.trainer.step_timeout_s,
        has_servers=config.rollout.servers > 0,
    )
    try:
        await start_engines(config, plan, engines)
        yield engines
    finally:
        await stop_engines(engines)


@task(name="start engines", cache_policy=NO_CACHE)
async def start_engines(config: RunSettings, plan: RunPlan, engines: Engines) -> None:
    """Start trainer and rollout side by side, restore the checkpoint, push its weights."""
    platform = detect(config.cluster.device)
    timeout_s = config.cluster.start_timeout_s
    starts = [_start_rollout(config, plan, platform, timeout_s)]
    if engines.ranks:
        starts.append(_start_trainer(config, plan, engines, platform, timeout_s))
    await asyncio.gather(*starts)
    if engines.ranks and engines.has_servers:
        await cluster.call(
            engines.manager,
            "attach_trainer",
            list(engines.ranks),
            engines.cluster.namespace,
            timeout_s=timeout_s,
        )


@task(name="stop engines", cache_policy=NO_CACHE)
async def stop_engines(engines: Engines) -> None:
    """End servers, router, actors and a private Ray. An engine that is gone already is fine."""
    try:
        await cluster.call(engines.manager, "stop", timeout_s=60.0)
    except (cluster.EngineDiedError, cluster.DeadlineError) as error:
        print(f"while stopping: {error}")
    finally:
        cluster.kill_actors([engines.manager, *engines.ranks])
        cluster.disconnect(engines.cluster)


async def _start_rollout(
    config: RunSettings, plan: RunPlan, platform: Platform, timeout_s: float
) -> None:
    sglang = dict(config.sglang)
    if config.model.random_weights:
        sglang.setdefault("load_format", "dummy")
    cluster.start_actor(
        RolloutManager,
        MANAGER,
        plan.run,
        config.store,
        config.model,
        config.data,
        config.rollout,
        list(config.evals),
        sglang,
        dict(config.router),
        platform.device,
        str(log_folder(plan.run.name)),
        max_concurrency=64,
    )
    await cluster.call(MANAGER, "start", timeout_s=timeout_s)


async def _start_trainer(
    config: RunSettings, plan: RunPlan, engines: Engines, platform: Platform, timeout_s: float
) -> None:
    for rank, name in enumerate(engines.ranks):
        cluster.start_actor(
            TrainerRank,
            name,
            rank,
            len(engines.ranks),
            plan.run,
            config.store,
            config.model,
            config.trainer,
            dict(config.megatron),
            config.algorithm,
            config.gates,
            config.rollout.sampling.temperature,
            config.steps,
            platform.device,
            gpus=platform.gpus_per_engine,
        )
    master = await cluster.call(engines.ranks[0], "address", timeout_s=timeout_s)
    await cluster.call(engines.ranks, "setup", master[0], timeout_s=timeout_s)
    await cluster.call(engines.ranks, "restore", plan.checkpoint, timeout_s=timeout_s)


def log_folder(run: str) -> Path:
    """Where the engines of a run write their logs on this machine."""
    return Path(".rollflow/logs").resolve() / run
