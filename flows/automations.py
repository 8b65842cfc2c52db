"""What the Prefect server does by itself: it notices a dead flow, starts it again, evaluates checkpoints."""

from datetime import timedelta
from typing import Any

from prefect.client.orchestration import PrefectClient
from prefect.client.schemas.objects import StateType
from prefect.events.actions import ChangeFlowRunState, RunDeployment
from prefect.events.schemas.automations import AutomationCore, EventTrigger, Posture
from prefect.events.schemas.events import ResourceSpecification

from rollflow.tasks.events import CHECKPOINT_COMMITTED, ENDED, WISHES_EVALUATION

HEARTBEAT_S = 30
"""Seconds between two signs of life of a flow: the least that Prefect allows."""
SILENCE_S = 90
"""Silence after which a flow counts as dead."""
PREFIX = "rollflow: "

BEAT = "prefect.flow-run.heartbeat"
CRASHED = "prefect.flow-run.Crashed"
SIGNS = {
    BEAT,
    ENDED,
    "prefect.flow-run.Completed",
    "prefect.flow-run.Failed",
    "prefect.flow-run.Cancelled",
    "prefect.flow-run.Suspended",
}
"""What a flow that lives, or has ended in order, is heard of by. A server that was started again holds
back Prefect's own events of older runs for up to 15 minutes; heartbeats and ``ENDED`` come at once."""


async def deploy_automations(client: PrefectClient, evaluate: str, tag: str) -> None:
    """Create the automations, or replace those of an earlier deployment.

    Args:
        evaluate: id of the deployment that evaluates a checkpoint.
        tag: of the flow runs that are watched.
    """
    for standing in await client.read_automations():
        if standing.name.startswith(PREFIX):  # those too that an earlier version named otherwise
            await client.delete_automation(standing.id)
    for automation in automations(evaluate, tag):
        await client.create_automation(automation)


def automations(evaluate: str, tag: str) -> list[AutomationCore]:
    """The automations, as Prefect's client takes them."""
    ours = _resource({"prefect.resource.role": "tag", "prefect.resource.id": f"prefect.tag.{tag}"})
    flow_runs = _resource({"prefect.resource.id": "prefect.flow-run.*"})
    return [
        AutomationCore(
            name=f"{PREFIX}a silent run goes on",
            description=f"No heartbeat of a flow run for {SILENCE_S} s: its process is gone. It is "
            "scheduled again and goes on from its log.",
            trigger=EventTrigger(
                posture=Posture.Proactive,
                match=flow_runs,
                match_related=ours,
                after={BEAT},
                expect=SIGNS,
                for_each={"prefect.resource.id"},
                threshold=1,
                within=timedelta(seconds=SILENCE_S),
            ),
            actions=[
                ChangeFlowRunState(
                    state=StateType.SCHEDULED,
                    name="AwaitingRetry",
                    message=f"no heartbeat for {SILENCE_S} s; it goes on from its log on a live worker",
                    force=False,
                )
            ],
        ),
        AutomationCore(
            name=f"{PREFIX}a crashed run goes on",
            description="A flow run whose process died is scheduled again; it goes on from its log.",
            trigger=EventTrigger(
                posture=Posture.Reactive,
                match=flow_runs,
                match_related=ours,
                expect={CRASHED},
                for_each={"prefect.resource.id"},
                threshold=1,
            ),
            actions=[
                ChangeFlowRunState(
                    state=StateType.SCHEDULED,
                    name="AwaitingRetry",
                    message="its process died; it goes on from its log on a live worker",
                    force=False,
                )
            ],
        ),
        AutomationCore(
            name=f"{PREFIX}each checkpoint is evaluated",
            description="A checkpoint of a run with `checkpoint.evaluate` starts an evaluation.",
            trigger=EventTrigger(
                posture=Posture.Reactive,
                match=_resource({WISHES_EVALUATION: "true"}),
                expect={CHECKPOINT_COMMITTED},
                for_each={"prefect.resource.id"},
                threshold=1,
            ),
            actions=[
                RunDeployment(
                    source="selected",
                    deployment_id=evaluate,  # pyright: ignore[reportArgumentType]
                    parameters={
                        name: _from_payload(name)
                        for name in ("run", "step", "store", "settings", "training")
                    },
                    job_variables=None,
                )
            ],
        ),
    ]


def _resource(labels: dict[str, str | list[str]]) -> ResourceSpecification:
    return ResourceSpecification(labels)  # pyright: ignore[reportCallIssue]


def _from_payload(name: str) -> dict[str, Any]:
    """A parameter that the event brings, of the type that it has there."""
    template = "{{ event.payload.%s | tojson }}" % name  # noqa: UP031
    return {
        "__prefect_kind": "json",
        "value": {"__prefect_kind": "jinja", "template": template},
    }
