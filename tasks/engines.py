"""Start and stop the engines of a run: named Ray actors that outlive any one task."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefect import get_run_logger, task
from prefect.cache_policies import NO_CACHE
from prefect.exceptions import TerminationSignal
from ray.exceptions import RayError
from ray.util.placement_group import PlacementGroup

from rollflow.engines import cluster, placement
from rollflow.engines.algorithms.config import resolved
from rollflow.engines.cluster import DeadlineError, EngineDiedError
from rollflow.engines.megatron.actor import TrainerRank
from rollflow.engines.null import NullRollout, NullTrainer
from rollflow.engines.platform import Platform, detect
from rollflow.engines.rollout import forked
from rollflow.engines.rollout.client import GenerationError
from rollflow.engines.rollout.experts import SWITCH
from rollflow.engines.rollout.manager import RolloutManager
from rollflow.engines.rollout.server import ServerError
from rollflow.storage.refs import RunRef

from .preflight import RunPlan
from .settings import RunSettings

MANAGER = "rollout"
STOP_TIMEOUT_S = 60.0


LOST_ENGINE = (EngineDiedError, DeadlineError, ServerError, GenerationError, RayError)
"""Faults of processes and machines. A gate or a damaged log is none: trying again cannot help."""
SIGNALLED = (asyncio.CancelledError, KeyboardInterrupt, TerminationSignal)
"""What SIGINT and SIGTERM raise. Whoever sends one to the whole process group, as systemd and `timeout`
do, ends the head of a private Ray too."""


class StartError(RuntimeError):
    """An engine was lost before all were up; the message says which and how."""


@dataclass(frozen=True, slots=True)
class Engines:
    """The engines of a run, by name. Pass it on; only tasks look inside."""

    cluster: cluster.ClusterRef
    ranks: tuple[str, ...]
    """Trainer actors in the order of their ranks; empty where nothing is trained."""
    manager: str
    """The rollout actor; empty where nothing is generated."""
    timeout_s: float
    """Deadline of one call."""
    has_servers: bool
    take_turns: bool = False
    """Servers and trainer share a GPU: the servers sleep while the trainer trains."""


@asynccontextmanager
async def running_engines(
    config: RunSettings, plan: RunPlan, *, train: bool = True, rollout: bool = True
) -> AsyncIterator[Engines]:
    """The engines, up; stopped on the way out, whatever happened.

    ``train`` and ``rollout`` tell which of the two sides are wanted. The trainer has the model's
    first weights until :func:`restore_checkpoint`.
    """
    own_servers = rollout and bool(config.rollout.tables({}))
    if own_servers:
        forked.hold()  # on a Ray of our own, engines that start anew import nothing
    try:
        ref, signalled = cluster.connect(config.cluster, _own_name(plan.run)), False
    except DeadlineError as error:
        raise StartError(f"the engines did not start: {error}") from error
    engines = Engines(
        cluster=ref,
        ranks=tuple(f"trainer-{r}" for r in range(config.trainer.ranks)) if train else (),
        manager=MANAGER if rollout else "",
        timeout_s=config.trainer.step_timeout_s,
        has_servers=rollout and config.rollout.generates,
        take_turns=config.cluster.colocate and train and own_servers,
    )
    try:
        try:
            await start_engines(config, plan, engines)
        except LOST_ENGINE as error:
            raise StartError(f"the engines did not start: {error}") from error
        yield engines
    except SIGNALLED:
        signalled = True
        raise
    finally:
        if signalled and ref.temp_dir:
            cluster.disconnect(ref)  # it ends everything; no call may reach it any more
        else:
            await stop_engines(engines)


@task(name="start engines", cache_policy=NO_CACHE)
async def start_engines(config: RunSettings, plan: RunPlan, engines: Engines) -> None:
    """Start trainer and rollout side by side. Where they share a GPU the model comes last: a server's
    cache takes its share of what it finds free."""
    if config.cluster.address == cluster.NULL:
        _start_null(config, plan, engines)
        return
    platform = detect(config.cluster.device)
    timeout_s = config.cluster.start_timeout_s
    group = None
    if engines.ranks:
        group = await placement.reserve(
            len(engines.ranks), platform, config.cluster.placement, timeout_s=timeout_s
        )
    served = asyncio.Event()
    starts = []
    if engines.manager:
        place = _beside(group, shares_gpu=engines.take_turns) if group is not None else None
        starts.append(_start_rollout(config, plan, place, platform, timeout_s, served))
    if group is not None:
        after = served if engines.take_turns else None
        starts.append(_start_trainer(config, plan, engines, group, platform, timeout_s, after))
    starting = [asyncio.ensure_future(start) for start in starts]
    try:
        await asyncio.gather(*starting)
    finally:
        for start in starting:  # one that waits for another, which failed
            start.cancel()
    if engines.ranks and engines.manager:
        await cluster.call(
            engines.manager,
            "attach_trainer",
            list(engines.ranks),
            engines.cluster.namespace,
            0.9 * engines.timeout_s,  # before the flow's own, so that the rank is blamed
            timeout_s=timeout_s,
        )


@task(name="stop engines", cache_policy=NO_CACHE)
async def stop_engines(engines: Engines) -> None:
    """End servers, router, actors and a private Ray. An engine that is gone already is fine."""
    try:
        if engines.manager:
            await cluster.call(engines.manager, "stop", timeout_s=STOP_TIMEOUT_S)
    except (cluster.EngineDiedError, cluster.DeadlineError) as error:
        get_run_logger().warning("while stopping: %s", error)
    finally:
        order = [cluster.ORDER] if len(engines.ranks) > 1 else []
        try:
            cluster.kill_actors([*filter(None, [engines.manager]), *engines.ranks, *order])
            if engines.ranks and engines.cluster.address != cluster.NULL:
                placement.release()
        finally:
            cluster.disconnect(engines.cluster)


def _start_null(config: RunSettings, plan: RunPlan, engines: Engines) -> None:
    if engines.manager:
        cluster.start_here(NullRollout, engines.manager, plan.run, config.store)
    for rank, name in enumerate(engines.ranks):
        ranks = len(engines.ranks)
        cluster.start_here(NullTrainer, name, rank, ranks, plan.run, config.store)


def _beside(group: PlacementGroup, *, shares_gpu: bool) -> Any:
    """Where the rollout goes: to the trainer's machine, or into the place of its one GPU too."""
    if shares_gpu:
        return placement.in_bundle(group, 0, with_children=True)
    return placement.on_its_machine(group)


async def _start_rollout(
    config: RunSettings,
    plan: RunPlan,
    place: Any,
    platform: Platform,
    timeout_s: float,
    served: asyncio.Event,
) -> None:
    """``place``: Ray's scheduling strategy of the manager. ``served`` is set at the end."""
    cluster.start_actor(
        RolloutManager,
        MANAGER,
        plan.run,
        config.store,
        config.model,
        [config.data, *config.sources],
        config.rollout,
        config.hooks,
        list(config.evals),
        {**config.sglang, **({SWITCH: True} if config.trainer.router_replay else {})},
        dict(config.router),
        platform.device,
        str(log_folder(_own_name(plan.run))),
        config.cluster.colocate,
        max_concurrency=64,
        scheduling_strategy=place,
    )
    [info] = await cluster.call(MANAGER, "start", timeout_s=timeout_s)
    for notice in info.notices:
        get_run_logger().warning(notice)
    served.set()


async def _start_trainer(
    config: RunSettings,
    plan: RunPlan,
    engines: Engines,
    group: PlacementGroup,
    platform: Platform,
    timeout_s: float,
    after: asyncio.Event | None,
) -> None:
    """``after``: what the GPU's memory is left alone until; the ranks import what they need before."""
    first, *others = engines.ranks
    if others:
        cluster.start_order()
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
            resolved(config.algorithm, config.rollout.sampling.max_new_tokens),
            config.gates,
            config.rollout.sampling.temperature,
            config.steps,
            platform.device,
            config.cluster.colocate,
            gpus=platform.gpus_per_engine(shared=config.cluster.colocate),
            scheduling_strategy=placement.in_bundle(group, rank),
        )
    master = await cluster.call(first, "address", timeout_s=timeout_s)
    if after is not None:
        await after.wait()
    await cluster.call(engines.ranks, "setup", master[0], timeout_s=timeout_s)


@task(name="restore checkpoint", cache_policy=NO_CACHE)
async def restore_checkpoint(config: RunSettings, plan: RunPlan, engines: Engines) -> None:
    """Bring the trainer to the plan's checkpoint; without one it keeps the first weights."""
    timeout_s = config.cluster.start_timeout_s
    await cluster.call(engines.ranks, "restore", plan.checkpoint, timeout_s=timeout_s)


def _own_name(run: RunRef) -> str:
    """What the engines' namespace and folder are called: an evaluation beside a training has others."""
    return f"{run.name}-{run.writer}" if run.writer else run.name


def log_folder(run: str) -> Path:
    """Where the engines of a run write their logs on this machine."""
    return Path(".rollflow/logs").resolve() / run
