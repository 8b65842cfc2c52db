"""What a run tells the Prefect server's automations: a checkpoint stands, an evaluation is done."""

import asyncio
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from prefect.context import FlowRunContext
from prefect.events import emit_event

from rollflow.storage.checkpoints import find_checkpoint
from rollflow.storage.config import StoreConfig
from rollflow.storage.objects import Store
from rollflow.storage.refs import BatchRef, CheckpointRef, RunRef

CHECKPOINT_COMMITTED = "rollflow.checkpoint.committed"
EVALUATION_COMMITTED = "rollflow.evaluation.committed"
ENDED = "rollflow.flow-run.ended"
REGRESSION = "rollflow.evaluation.regression"
WISHES_EVALUATION = "rollflow.evaluate"
"""Label of a checkpoint's event: ``true`` where the run wants a flow run to evaluate it."""


class Announcements:
    """The checkpoints of a run that are under way into the store; each is told of once it stands.

    A checkpoint's event has the same id whenever it is sent, so that the server counts it once: a
    flow that was killed between the commit and the event sends it again when it goes on.
    """

    def __init__(
        self,
        store: StoreConfig,
        run: RunRef,
        settings: Mapping[str, Any],
        *,
        evaluate: bool,
        first: CheckpointRef | None,
    ) -> None:
        self._config, self._store, self._run = store, Store(store), run
        self._settings, self._evaluate = dict(settings), evaluate
        self._pending = [first.step] if first else []

    def saving(self, step: int) -> None:
        """The checkpoint of ``step`` is written, perhaps in the background."""
        self._pending.append(step)

    async def tell(self) -> None:
        """Send the event of every checkpoint that stands by now."""
        for step in list(self._pending):
            found = await asyncio.to_thread(find_checkpoint, self._store, self._run, step)
            if found is not None:
                self._emit(found)
                self._pending.remove(step)

    def _emit(self, checkpoint: CheckpointRef) -> None:
        context = FlowRunContext.get()
        flow_run = context.flow_run if context else None
        emit_event(
            CHECKPOINT_COMMITTED,
            id=uuid.uuid5(uuid.NAMESPACE_URL, f"{checkpoint.url}#{checkpoint.weights_digest}"),
            resource={
                **_checkpoint_resource(checkpoint.run, checkpoint.step),
                WISHES_EVALUATION: str(self._evaluate).lower(),
            },
            payload={
                "run": checkpoint.run.name,
                "step": checkpoint.step,
                "version": checkpoint.step + 1,
                "url": checkpoint.url,
                "weights_digest": checkpoint.weights_digest,
                "store": self._config.model_dump(mode="json"),
                "settings": self._settings,
                "training": str(flow_run.id) if flow_run else "",
            },
        )


def tell_evaluated(run: RunRef, version: int, batches: Sequence[BatchRef]) -> None:
    """Send the event of an evaluation of the weights that were trained ``version`` steps."""
    emit_event(
        EVALUATION_COMMITTED,
        resource=_checkpoint_resource(run, version - 1),
        payload={
            "run": run.name,
            "step": version - 1,
            "version": version,
            "urls": [batch.url for batch in batches],
            "metrics": {k: v for batch in batches for k, v in batch.metrics.items()},
        },
    )


def tell_regression(run: RunRef, version: int, facts: Mapping[str, Any]) -> None:
    """Send the event of a checkpoint that is worse than one before it."""
    emit_event(
        REGRESSION,
        resource=_checkpoint_resource(run, version - 1),
        payload={"run": run.name, "step": version - 1, "version": version, **facts},
    )


@contextmanager
def end_told() -> Iterator[None]:
    """After this block, however it ends, say that this flow run's process ends in order: whoever waits for
    the next heartbeat must not take it for dead. Nothing happens outside of a flow run."""
    try:
        yield
    finally:
        _tell_ended()


def _tell_ended() -> None:
    context = FlowRunContext.get()
    if context and (flow_run := context.flow_run):
        resource = {
            "prefect.resource.id": f"prefect.flow-run.{flow_run.id}",
            "prefect.resource.name": flow_run.name,
        }
        emit_event(ENDED, resource=resource)


def _checkpoint_resource(run: RunRef, step: int) -> dict[str, str]:
    return {
        "prefect.resource.id": f"rollflow.checkpoint.{run.name}.{step}",
        "prefect.resource.name": f"checkpoint of {run.name} after step {step}",
        "rollflow.run": run.name,
        "rollflow.step": str(step),
    }
