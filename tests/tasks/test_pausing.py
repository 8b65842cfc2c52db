"""A suspension takes effect between two steps, through Prefect's own request."""

import pytest
from prefect._flow_run_suspension import (
    FlowRunSuspensionRequest,
    raise_if_flow_run_suspension_requested,
)
from prefect.context import FlowRunContext
from prefect.exceptions import Pause
from prefect.states import Suspended

from rollflow.tasks.pausing import pausing_between_steps


@pytest.fixture
def request_():
    request = FlowRunSuspensionRequest()
    with FlowRunContext.model_construct(flow_run_suspension_request=request, flow_run=None):
        yield request


def test_prefect_ends_no_task_until_the_step_is_done(request_):
    with pausing_between_steps() as boundary:
        boundary.pause()  # nobody asked
        assert not boundary.asked()
        request_.mark_requested(Suspended())
        assert boundary.asked()
        raise_if_flow_run_suspension_requested()  # what Prefect does around every task
        with pytest.raises(Pause) as raised:
            boundary.pause()
    assert raised.value.state
    assert raised.value.state.name == "Suspended"


def test_afterwards_prefect_decides_again(request_):
    with pausing_between_steps():
        request_.mark_requested(Suspended())
    with pytest.raises(Pause):
        raise_if_flow_run_suspension_requested()


def test_outside_of_a_flow_nothing_is_held_back():
    with pausing_between_steps() as boundary:
        assert not boundary.asked()
        boundary.pause()
