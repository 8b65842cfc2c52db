"""Flow runs on the Prefect server: started from a deployment, found by the run's name, acted upon."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from hashlib import sha256
from typing import Any
from uuid import UUID

from prefect import get_client
from prefect.client.schemas.actions import DeploymentScheduleCreate
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterName, FlowRunFilterTags
from prefect.client.schemas.objects import FlowRun, StateType
from prefect.client.schemas.schedules import CronSchedule
from prefect.client.schemas.sorting import FlowRunSort
from prefect.exceptions import ObjectNotFound, PrefectHTTPStatusError
from prefect.states import Cancelled, Cancelling, Scheduled
from pydantic import ValidationError

from rollflow.tasks import judging

from .config import RunConfig
from .deployments import GENERIC, TAG

ENDED = {StateType.COMPLETED, StateType.FAILED, StateType.CANCELLED, StateType.CRASHED}


@dataclass(frozen=True, slots=True)
class Submitted:
    """A flow run that was handed to the server, or the schedule of many."""

    name: str
    id: str
    when: str


async def submit(flow: str, config: RunConfig, at: datetime | None = None) -> Submitted:
    """Schedule one flow run of ``train`` or ``sft``, now or at a time.

    Raises:
        ValueError: the flow is not deployed, or a flow run of that name has not ended.
    """
    parameters = {"config": config.model_dump(mode="json")}
    for before in await flow_runs(config.name):
        if before.state and before.state.type not in ENDED:
            raise ValueError(
                f"name = {config.name!r}: flow run {before.id} of it is {before.state.type.value.lower()}; "
                "choose another name, or `rollflow resume` or `rollflow cancel` that one"
            )
    when = at.astimezone(UTC) if at else datetime.now(UTC)
    deployment = await _deployment(flow)
    async with get_client() as client:
        try:
            run = await client.create_flow_run_from_deployment(
                deployment,
                parameters=parameters,
                name=config.name,
                state=Scheduled(scheduled_time=when),
            )
        except PrefectHTTPStatusError as error:
            if error.response.status_code != 409:
                raise
            raise ValueError(
                f"the deployment {flow}/{GENERIC} does not accept these settings: "
                f"{error.response.json()['detail']}; if rollflow was changed since it was deployed, "
                "`rollflow deploy` tells the server of the new settings"
            ) from error
    return Submitted(config.name, str(run.id), f"at {when:%Y-%m-%d %H:%M:%S} UTC" if at else "now")


async def schedule(flow: str, parameters: Mapping[str, Any], cron: str, name: str) -> Submitted:
    """Add a schedule to the flow's deployment; ``name`` tells it from others.

    Raises:
        ValueError: the flow is not deployed, or ``cron`` is none.
    """
    deployment = await _deployment(flow)
    try:
        by_the_clock = CronSchedule(cron=cron, timezone="UTC")
    except ValidationError as error:
        raise ValueError(
            f"cron = {cron!r}: {error.errors()[0]['msg']}; give minute, hour, day of the month, month and "
            'day of the week, e.g. "0 3 * * *"'
        ) from error
    create = DeploymentScheduleCreate(
        schedule=by_the_clock,
        active=True,
        parameters=dict(parameters),
        slug=slug(name),
    )
    async with get_client() as client:
        standing = await client.read_deployment_schedules(deployment)
        for old in standing:
            if old.slug == create.slug:
                await client.delete_deployment_schedule(deployment, old.id)
        [made] = await client.create_deployment_schedules(deployment, [create])
    return Submitted(name, str(made.id), f"by {cron!r} UTC")


def slug(name: str) -> str:
    """A schedule's name in Prefect's small letters, digits and hyphens; a digest tells others apart."""
    plain = re.sub("[^a-z0-9]+", "-", name.lower())
    return plain if plain == name else f"{plain}-{sha256(name.encode()).hexdigest()[:6]}"


async def suspend(run: str) -> FlowRun:
    """Suspend the live flow run of a run; it ends after the step that it is in.

    Raises:
        ValueError: there is none that runs by a deployment.
    """
    flow_run = await _live(run, {StateType.RUNNING})
    if not await judging.suspend(flow_run.id, "by rollflow pause"):
        raise ValueError(
            f"{run}: the server did not suspend flow run {flow_run.id}; is it running?"
        )
    return flow_run


async def resume(run: str) -> FlowRun | None:
    """Let the suspended flow run of a run go on; None where there is none."""
    found = [r for r in await flow_runs(run) if r.state and r.state.type == StateType.PAUSED]
    if not found:
        return None
    await judging.resume(found[0].id)
    return found[0]


async def cancel(run: str) -> FlowRun:
    """Cancel the flow run of a run; its worker ends it, and it stops its engines.

    Raises:
        ValueError: there is none that has not ended.
    """
    states = set(StateType) - ENDED
    flow_run = await _live(run, states)
    waits = {StateType.SCHEDULED, StateType.PAUSED}
    begun = flow_run.state is not None and flow_run.state.type not in waits
    async with get_client() as client:
        await client.set_flow_run_state(flow_run.id, Cancelling() if begun else Cancelled())
    return flow_run


async def flow_runs(run: str = "", limit: int = 50) -> list[FlowRun]:
    """Flow runs of a run's name, or all of ours; the one that started last comes first."""
    chosen = FlowRunFilter(
        name=FlowRunFilterName(any_=[run]) if run else None, tags=FlowRunFilterTags(all_=[TAG])
    )
    async with get_client() as client:
        return await client.read_flow_runs(
            flow_run_filter=chosen, sort=FlowRunSort.EXPECTED_START_TIME_DESC, limit=limit
        )


async def _live(run: str, states: set[StateType]) -> FlowRun:
    found = await flow_runs(run)
    live = [r for r in found if r.state and r.state.type in states]
    if not live:
        seen = ", ".join(f"{r.id} {r.state.name if r.state else ''}" for r in found[:3])
        wanted = ", ".join(sorted(s.value.lower() for s in states))
        raise ValueError(
            f"no flow run of {run!r} by a deployment is {wanted} (there: {seen or 'none'}); one that "
            "`rollflow train` started is stopped by Ctrl-C and goes on by `rollflow resume`"
        )
    return live[0]


async def _deployment(flow: str) -> UUID:
    async with get_client() as client:
        try:
            return (await client.read_deployment_by_name(f"{flow}/{GENERIC}")).id
        except ObjectNotFound as error:
            raise ValueError(
                f"flow {flow!r} is not deployed on this server; `rollflow up` or `rollflow deploy` does it"
            ) from error
