"""How engines are left: in order, or at once where a signal ends the flow."""

import asyncio
from types import SimpleNamespace

import pytest
from prefect.exceptions import TerminationSignal

from rollflow.engines.cluster import ClusterRef
from rollflow.flows.arguments import build_config
from rollflow.storage.refs import RunRef
from rollflow.tasks import engines
from tests.flows.least import BASE


@pytest.mark.parametrize("address", ["local", "127.0.0.1:6379"])
@pytest.mark.parametrize(
    ("error", "in_order"),
    [
        (RuntimeError(), True),
        (asyncio.CancelledError(), False),
        (KeyboardInterrupt(), False),
        (TerminationSignal(15), False),
    ],
)
async def test_after_a_signal_a_private_ray_is_asked_nothing(monkeypatch, error, in_order, address):
    is_private = address == "local"
    ref = ClusterRef(address, "run", "/tmp/rf-1" if is_private else "")
    left = []

    async def nothing(*_):
        pass

    async def stop(_):
        left.append("stopped")

    monkeypatch.setattr(engines.cluster, "connect", lambda *_: ref)
    monkeypatch.setattr(engines.cluster, "disconnect", lambda _: left.append("disconnected"))
    monkeypatch.setattr(engines, "start_engines", nothing)
    monkeypatch.setattr(engines, "stop_engines", stop)
    plan = SimpleNamespace(run=RunRef("run", "memory://run"))
    with pytest.raises(type(error)):
        async with engines.running_engines(build_config(BASE), plan):  # pyright: ignore[reportArgumentType]
            raise error
    assert left == ["stopped" if in_order or not is_private else "disconnected"]
