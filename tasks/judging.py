"""What the evaluations of a run's checkpoints look like in Prefect, and the suspension of its flow."""

from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from uuid import UUID

import httpx
from prefect import get_client, get_run_logger
from prefect.artifacts import acreate_table_artifact
from prefect.states import Suspended

from rollflow.storage.refs import RunRef

from .report import artifact_key

WAITS = timedelta(days=30)
"""How long a suspended flow run waits for a person before Prefect lets it fail. Retried, it goes on."""


async def show_evaluations(run: RunRef, evaluations: Mapping[int, Mapping[str, float]]) -> None:
    """A table of all evaluations of the run, a row for each version of its weights, in order."""
    names = sorted({name for metrics in evaluations.values() for name in metrics})
    table = [
        {"steps trained": version, "checkpoint": f"step-{version - 1:06d}" if version else "none"}
        | {name: f"{metrics[name]:.6g}" if name in metrics else "" for name in names}
        for version, metrics in sorted(evaluations.items())
    ]
    try:
        await acreate_table_artifact(
            key=artifact_key(run.name, "evaluations"),
            table=table,
            description=f"Run `{run.name}`: evaluations by the steps that the weights were trained. "
            f"Store: `{run.url}/evals`",
        )
    except httpx.HTTPError as error:  # the evaluation stands in the store
        get_run_logger().warning("no artifact for the evaluations: %r", error)


def warn(text: str) -> None:
    """Write a warning to the flow run's log."""
    get_run_logger().warning(text)


async def suspend(flow_run: UUID, reason: str) -> bool:
    """Suspend a flow run, as the UI's button does: it stops after its current step; whether it ran."""
    state = Suspended(pause_expiration_time=datetime.now(UTC) + WAITS)
    state = state.model_copy(update={"message": reason})
    async with get_client() as client:
        answer = await client.set_flow_run_state(flow_run, state)
    return answer.status.value == "ACCEPT"


async def resume(flow_run: UUID) -> bool:
    """Let a suspended flow run go on; whether it was suspended."""
    async with get_client() as client:
        answer = await client.resume_flow_run(flow_run)
    return answer.status.value == "ACCEPT"
