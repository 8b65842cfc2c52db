"""The processes of deploy/compose.yaml without containers: ``make topology``.

PostgreSQL of the distribution, an S3 server, a Prefect server with a password on that database, a
worker, and a Ray cluster of a head and two more nodes that asks for a token. Skipped where
PostgreSQL's programs are not installed.
"""

import os
import pwd
import secrets
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from rollflow.storage.config import StoreConfig
from rollflow.storage.manifests import find_batch
from rollflow.storage.objects import Store
from rollflow.storage.runs import open_run
from rollflow.storage.steps import step_numbers
from tests.object_stores import BUCKET, ENVIRONMENT, ObjectStoreServer, install

from .operated import Stack

AUTH = "admin:correct horse"
BIN = next(iter(sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)), Path("/none"))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def database() -> Iterator[str]:
    """The URL of an empty PostgreSQL database on loopback."""
    if not (BIN / "initdb").exists():
        pytest.skip("PostgreSQL is not installed (Debian: postgresql)")
    folder, port = Path(tempfile.mkdtemp(prefix="pg-")), free_port()
    as_user = {}
    if os.getuid() == 0:  # it does not run as root
        owner = pwd.getpwnam("postgres")
        os.chown(folder, owner.pw_uid, owner.pw_gid)
        as_user = {"user": owner.pw_uid, "group": owner.pw_gid}
    quiet = {"stdout": subprocess.DEVNULL, "cwd": folder, **as_user}
    subprocess.run(
        [BIN / "initdb", "-D", folder / "data", "-U", "prefect", "-A", "trust"], check=True, **quiet
    )
    options = ["-h", "127.0.0.1", "-p", str(port), "-k", str(folder), "-c", "fsync=off"]
    server = subprocess.Popen([BIN / "postgres", "-D", folder / "data", *options], **quiet)
    begun = time.monotonic()
    ready = [BIN / "pg_isready", "-h", "127.0.0.1", "-p", str(port)]
    while subprocess.run(ready, stdout=subprocess.DEVNULL).returncode:
        assert time.monotonic() - begun < 60, "PostgreSQL did not come up in 60 s"
        time.sleep(0.1)
    yield f"postgresql+asyncpg://prefect@127.0.0.1:{port}/postgres"
    server.send_signal(signal.SIGINT)
    server.wait(60)
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def prefect(database, tmp_path_factory) -> Iterator[str]:
    """The URL of a Prefect server with a password on that database."""
    folder, port = tmp_path_factory.mktemp("prefect"), free_port()
    environment = {
        **os.environ,
        "PREFECT_HOME": str(folder),
        "PREFECT_API_DATABASE_CONNECTION_URL": database,
        "PREFECT_SERVER_API_AUTH_STRING": AUTH,
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "DO_NOT_TRACK": "1",
    }
    with (folder / "log").open("wb") as log:
        address = ("--host", "127.0.0.1", "--port", str(port))
        server = subprocess.Popen(
            [sys.executable, "-m", "prefect", "server", "start", *address],
            env=environment, stdout=log, stderr=log,
        )  # fmt: skip
    url, begun = f"http://127.0.0.1:{port}/api", time.monotonic()
    while True:
        try:
            if (
                httpx.get(f"{url}/health", auth=httpx.BasicAuth(*AUTH.split(":"))).status_code
                == 200
            ):
                break
        except httpx.HTTPError:
            pass
        assert server.poll() is None and time.monotonic() - begun < 120, (
            folder / "log"
        ).read_text()
        time.sleep(0.2)
    yield url
    server.send_signal(signal.SIGINT)
    server.wait(60)


@pytest.fixture(scope="module")
def objects(tmp_path_factory) -> Iterator[ObjectStoreServer]:
    install()
    server = ObjectStoreServer("moto", tmp_path_factory.mktemp("objects"))
    server.start()
    yield server
    server.kill()


@pytest.fixture(scope="module")
def ray_address(tmp_path_factory) -> Iterator[tuple[str, dict[str, str]]]:
    """Address of a Ray head with two nodes beside it, all on loopback, and what clients need to be let in."""
    client = {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    }
    folder = Path(tempfile.mkdtemp(prefix="rf-ray-"))  # its sockets' names have to be short
    nodes = subprocess.Popen(
        [sys.executable, "-m", "tests.flows.ray_nodes", str(folder)],
        env={**os.environ, **client}, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert nodes.stdin is not None
    assert nodes.stdout is not None
    try:
        assert select.select([nodes.stdout], [], [], 120)[0], "no Ray nodes after 120 s"
        address = nodes.stdout.readline().strip()
        assert address, "the Ray nodes did not start"
        yield address, client
    finally:
        nodes.stdin.close()
        nodes.wait(60)
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def stack(prefect, objects, ray_address, tmp_path_factory) -> Iterator[Stack]:
    environment = {
        **ENVIRONMENT,
        **ray_address[1],
        "PREFECT_API_URL": prefect,
        "PREFECT_API_AUTH_STRING": AUTH,
        "AWS_ENDPOINT_URL": objects.endpoint,
    }
    stack = Stack(tmp_path_factory.mktemp("topology"), environment)
    yield stack
    stack.rollflow("down")


def test_nobody_without_the_password_is_answered(prefect):
    assert httpx.post(f"{prefect}/flow_runs/filter", json={}).status_code == 401


def test_a_run_trains_into_the_object_store_and_its_checkpoints_are_evaluated(
    stack, objects, monkeypatch
):
    for name, value in {**ENVIRONMENT, "AWS_ENDPOINT_URL": objects.endpoint}.items():
        monkeypatch.setenv(name, value)
    url = f"s3://{BUCKET}/topology"
    words = ("--checkpoint.every", "4", "--checkpoint.evaluate", "true", "--store.url", url)
    stack.rollflow("submit", "run.toml", "--name", "t", "--steps", "8", *words)
    stack.wait("the run", lambda: stack.state("t") == "Completed")
    store = Store(StoreConfig(url=url))
    run = open_run(store, "t")
    assert step_numbers(store, run) == list(range(8))
    stack.wait("the evaluation", lambda: find_batch(store, run, 4, "heldout"))
    stack.wait("its flow run", lambda: stack.state("evaluate t") == "Completed")


def test_real_engines_train_on_a_ray_that_runs_already_and_leave_it(stack, ray_address):
    stack.rollflow(
        "submit", "run.toml", "--name", "ray", "--steps", "3", "--cluster.address", ray_address[0]
    )
    ended = ("Completed", "Failed", "Crashed")
    stack.wait("the run", lambda: stack.state("ray") in ended, 200)
    assert stack.state("ray") == "Completed"
    store, run = stack.stored("ray")
    assert step_numbers(store, run) == [0, 1, 2]
    asks = (
        f"import ray; ray.init({ray_address[0]!r}, log_to_driver=False); "
        "from ray._private import state; "
        "places = [a['Address']['NodeID'] for a in state.actors().values()]; "
        "print(len(ray.nodes()), ray.util.list_named_actors(all_namespaces=True), "
        "len(places), len(set(places)))"
    )
    told = subprocess.run(
        [sys.executable, "-c", asks],
        env={**os.environ, **ray_address[1]}, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    # The trainer's rank, the manager and its server, on one of the three nodes.
    assert told.stdout.strip() == "3 [] 3 1", told.stderr
