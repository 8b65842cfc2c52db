"""Where the store decides nothing, the Prefect server decides which flow writes."""

import asyncio
import os

import pytest
from prefect.settings import PREFECT_API_URL, temporary_settings

from rollflow.flows import server as prefect_server
from rollflow.flows.arguments import build_config
from rollflow.storage.lease import probe_conditional_puts
from rollflow.storage.objects import Store
from rollflow.storage.runs import create_run
from rollflow.tasks import recovery
from rollflow.tasks.recovery import only_writer, slot_name
from tests.object_stores import BUCKET, ENVIRONMENT, ObjectStoreServer, install


@pytest.fixture
def config(tmp_path, monkeypatch):
    install()
    server = ObjectStoreServer("rclone", tmp_path / "objects")
    for name in [n for n in os.environ if n.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    server.start()
    yield build_config(
        {
            "name": "run",
            "steps": 9,
            "model": {"path": "model"},
            "data": {"path": "train.jsonl"},
            "rollout": {"reward": "pkg.mod:fn"},
            "store": {"url": f"s3://{BUCKET}/slot", "options": {"endpoint_url": server.endpoint}},
        }
    )
    server.kill()


@pytest.fixture
def prefect_url(tmp_path, monkeypatch):
    """Where the API of an empty folder's Prefect server is."""
    monkeypatch.chdir(tmp_path)
    yield prefect_server._ensure().api_url
    prefect_server.stop()


@pytest.mark.filterwarnings("ignore:subprocess .* is still running:ResourceWarning")  # the server
async def test_two_flows_that_start_at_once_on_a_store_without_conditional_puts_take_turns(
    config, prefect_url, monkeypatch, capsys
):
    monkeypatch.setattr(recovery, "get_run_logger", lambda: __import__("logging").getLogger())
    store = Store(config.store)
    assert not probe_conditional_puts(store)
    run = create_run(store, config.name, {}, {}, "")
    inside: list[int] = []
    epochs: list[int] = []

    async def flow() -> None:
        async with only_writer(config, run) as lease:
            inside.append(1)
            assert sum(inside) == 1
            epochs.append(lease.run.epoch)
            while len(started) < 2:
                await asyncio.sleep(0)
            inside.append(-1)

    started: list[int] = []

    async def second() -> None:
        started.append(2)
        await flow()

    with temporary_settings({PREFECT_API_URL: prefect_url}):
        started.append(1)
        await asyncio.gather(flow(), second())
    assert epochs == [1, 2]
    assert slot_name(run) in capsys.readouterr().out
