"""Suspension from the Prefect UI, held back until a step is committed."""

from collections.abc import Iterator
from contextlib import contextmanager

from prefect._flow_run_suspension import FlowRunSuspensionRequest
from prefect.context import FlowRunContext
from prefect.exceptions import Pause


@contextmanager
def pausing_between_steps() -> Iterator["StepBoundary"]:
    """While this block runs, a suspended flow run goes on until it asks :meth:`StepBoundary.pause`.

    Prefect itself ends a suspended flow at whatever task begins or ends next: in the middle of a
    step, and before the engines could be stopped, which is a task too. The request is Prefect's own;
    only the moment at which it takes effect is ours. A flow run without a deployment cannot be
    suspended, and outside of a flow there is nothing to hold back.
    """
    context = FlowRunContext.get()
    request = context.flow_run_suspension_request if context else None
    if request is None:
        yield StepBoundary(None)
        return
    request.raise_if_requested = _later
    try:
        yield StepBoundary(request)
    finally:
        del request.raise_if_requested


class StepBoundary:
    """The place between two steps, where a flow run may be suspended."""

    def __init__(self, request: FlowRunSuspensionRequest | None) -> None:
        self._request = request

    def asked(self) -> bool:
        """Whether somebody has suspended this flow run."""
        return bool(self._request and self._request.get_state())

    def pause(self) -> None:
        """End this flow run here if somebody has suspended it: on resumption it begins anew, and goes
        on from the log.

        Raises:
            Pause: the signal by which Prefect ends a suspended flow run.
        """
        if self._request and (state := self._request.get_state()):
            raise Pause(state=state)


def _later() -> None:
    """In place of Prefect's own check: not now."""
