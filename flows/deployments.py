"""What the Prefect server is told of rollflow: its flows as deployments, and the automations.

The pool has two queues. Runs in ``engines`` need the cluster for themselves and wait for one another;
what runs in ``beside`` (evaluations, scoring, conversions) has engines of its own, or none.
"""

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prefect import Flow, get_client
from prefect.client.orchestration import PrefectClient
from prefect.client.schemas.actions import WorkPoolCreate, WorkPoolUpdate
from prefect.deployments.runner import RunnerDeployment
from prefect.exceptions import ObjectAlreadyExists, ObjectNotFound
from prefect.types.entrypoint import EntrypointType
from prefect.workers.process import ProcessWorker

from .arguments import load_config, recipes
from .automations import HEARTBEAT_S, deploy_automations
from .convert import convert
from .operated import evaluate_run, replay_run, rescore_run
from .train import sft, train

POOL = "rollflow"
ENGINES, BESIDE = "engines", "beside"
TAG = "rollflow"
GENERIC = "rollflow"
"""Name of each flow's deployment that presets nothing."""


@dataclass(frozen=True, slots=True)
class Deployed:
    """A deployment, as told to the server."""

    flow: Flow[..., Any]
    name: str
    queue: str
    description: str
    tags: tuple[str, ...] = ()
    parameters: Mapping[str, Any] = field(default_factory=dict)

    @property
    def full_name(self) -> str:
        """``flow/deployment``, as ``prefect deployment run`` takes it."""
        return f"{self.flow.name}/{self.name}"


@dataclass(frozen=True, slots=True)
class Placement:
    """Where runs of the deployments are started, and how many at once."""

    pool: str = POOL
    folder: Path | None = None
    """Working folder of the runs, which relative paths and hooks are found in; the worker's own
    where it is None (a pool that is no process pool)."""
    at_once: int = 1
    """Runs in ``engines`` at the same time: 1, unless the cluster has room for several."""
    beside: int = 1
    """Runs in ``beside`` at the same time."""


def deployments(presets: Sequence[Path] = ()) -> list[Deployed]:
    """Every flow with nothing preset, then the recipes, then settings files of one's own."""
    generic = [
        Deployed(train, GENERIC, ENGINES, "Reinforcement learning by the settings that are given."),
        Deployed(sft, GENERIC, ENGINES, "Supervised fine-tuning by the settings that are given."),
        Deployed(replay_run, GENERIC, ENGINES, "Train on the stored batches of a run again."),
        Deployed(evaluate_run, GENERIC, BESIDE, "Evaluate a checkpoint, while its run may go on."),
        Deployed(rescore_run, GENERIC, BESIDE, "Score the stored samples of a run again."),
        Deployed(convert, GENERIC, BESIDE, "A checkpoint from one format to another."),
    ]
    files = {**recipes(), **{file.stem: file for file in presets}}
    return [*generic, *(_of_file(name, file) for name, file in files.items())]


def _of_file(name: str, file: Path) -> Deployed:
    try:
        config = load_config(file)
    except (ValueError, OSError) as error:
        raise ValueError(f"{file}: {error}") from error
    supervised = config.algorithm.name == "sft"
    return Deployed(
        flow=sft if supervised else train,
        name=name,
        queue=ENGINES,
        description=_first_comment(file) or f"The settings of `{file.name}`.",
        tags=("preset", config.algorithm.name),
        parameters={"config": config.model_dump(mode="json")},
    )


def _first_comment(file: Path) -> str:
    lines = file.read_text().splitlines()
    return " ".join(line.lstrip("# ") for line in lines[:1] if line.startswith("#"))


async def deploy(placement: Placement, presets: Sequence[Path] = ()) -> list[str]:
    """Create or replace pool, queues, deployments and automations; the deployments' full names.

    A pool that stands already keeps its type and template. Schedules of a deployment stay.
    """
    async with get_client() as client:
        is_process = await _pool(client, placement)
        ids: dict[str, str] = {}
        for deployed in deployments(presets):
            made = registered(deployed, placement, is_process=is_process)
            ids[deployed.full_name] = str(await made.aapply())
        await deploy_automations(client, ids[f"{evaluate_run.name}/{GENERIC}"], TAG)
    return list(ids)


def registered(
    deployed: Deployed, placement: Placement, *, is_process: bool = True
) -> RunnerDeployment:
    """The deployment as Prefect's client takes it."""
    variables: dict[str, Any] = {"env": {"PREFECT_FLOWS_HEARTBEAT_FREQUENCY": str(HEARTBEAT_S)}}
    if is_process and placement.folder:
        variables["working_dir"] = str(placement.folder)
    made = RunnerDeployment.from_flow(
        deployed.flow,
        name=deployed.name,
        parameters=dict(deployed.parameters),
        description=deployed.description,
        tags=[TAG, deployed.flow.name, *deployed.tags],
        work_pool_name=placement.pool,
        work_queue_name=deployed.queue,
        job_variables=variables,
        entrypoint_type=EntrypointType.MODULE_PATH,
    )
    schema = made._parameter_openapi_schema
    made._parameter_openapi_schema = type(schema).model_validate(as_form(schema.model_dump()))
    return made


def as_form(schema: Mapping[str, Any]) -> dict[str, Any]:
    """A parameter schema as Prefect's form shows it: a choice between classes is ``anyOf`` there.

    The form knows no ``oneOf``. The classes exclude one another by their ``name``, so both mean the
    same; Pydantic, which reads the run's parameters, decides by the name as before.
    """
    return json.loads(json.dumps(schema), object_hook=_any_of)


def _any_of(node: dict[str, Any]) -> dict[str, Any]:
    if "oneOf" in node and "discriminator" in node:
        node = {k: v for k, v in node.items() if k != "discriminator"}
        node["anyOf"] = node.pop("oneOf")
    return node


async def _pool(client: PrefectClient, placement: Placement) -> bool:
    """Make the pool and its queues, or set their limits; whether it runs processes."""
    try:
        pool = await client.read_work_pool(placement.pool)
    except ObjectNotFound:
        template = ProcessWorker.get_default_base_job_template()
        with suppress(ObjectAlreadyExists):
            await client.create_work_pool(
                WorkPoolCreate(name=placement.pool, type="process", base_job_template=template)
            )
        pool = await client.read_work_pool(placement.pool)
    if pool.is_paused:
        await client.update_work_pool(placement.pool, WorkPoolUpdate(is_paused=False))
    for name, limit in ((ENGINES, placement.at_once), (BESIDE, placement.beside)):
        try:
            queue = await client.read_work_queue_by_name(name, work_pool_name=placement.pool)
            await client.update_work_queue(queue.id, concurrency_limit=limit)
        except ObjectNotFound:
            await client.create_work_queue(
                name=name, work_pool_name=placement.pool, concurrency_limit=limit
            )
    return pool.type == "process"


def names(deployed: Sequence[str]) -> dict[str, list[str]]:
    """Deployments by flow, for a table."""
    found: dict[str, list[str]] = {}
    for full_name in deployed:
        flow, _, name = full_name.partition("/")
        found.setdefault(flow, []).append(name)
    return found
