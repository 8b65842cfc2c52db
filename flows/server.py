"""The local Prefect server: SQLite, on loopback, one per working folder, left running for its UI.

Used when ``PREFECT_API_URL`` names no other server. Nothing here imports Prefect, because Prefect
reads its settings from the environment when it is imported.
"""

import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import httpx
import psutil
from filelock import AcquireReturnProxy, FileLock, Timeout

HOME = Path(".rollflow/prefect")
START_TIMEOUT_S = 300.0
TELL_AFTER_S = 5.0
STOP_TIMEOUT_S = 15.0
KEEP_EVERY_S = 1.0
ELSEWHERE_S = 10.0
"""A server that is not ours has so long to answer."""
STARTS = 3
EVENTS_KEPT = "P1D"
"""Events are most of the database: a day of them is enough for automations and the UI's feed."""
PORTS = range(4200, 4300)
OTHER_PORTS = range(20000, 30000)
"""All are below the range from which the system hands out ports to others."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KeptProcess:
    """A process that a file of the folder names."""

    pid: int
    started: float
    """Start time of the process, which with ``pid`` names it for sure."""

    def alive(self) -> bool:
        """Whether this very process still runs."""
        with contextlib.suppress(psutil.NoSuchProcess):
            process = psutil.Process(self.pid)
            same = abs(process.create_time() - self.started) < 1.0
            return same and process.status() != psutil.STATUS_ZOMBIE
        return False


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalServer(KeptProcess):
    """A running server, as kept in ``.rollflow/prefect/server.json``."""

    url: str

    @property
    def api_url(self) -> str:
        """What ``PREFECT_API_URL`` must be."""
        return f"{self.url}/api"


def use_server() -> str:
    """Point this process at a Prefect server, starting the local one if need be; returns its UI URL.

    Raises:
        RuntimeError: Prefect was imported before, and would start a hidden server of its own.
        RuntimeError: the one that ``PREFECT_API_URL`` names does not answer.
    """
    if api := os.environ.get("PREFECT_API_URL"):
        check_elsewhere(api)
        return api.removesuffix("/api")
    if "prefect" in sys.modules:
        raise RuntimeError("Prefect was imported before its server was chosen: import it later")
    server = _ensure()
    os.environ.update(_settings(), PREFECT_API_URL=server.api_url)
    threading.Thread(target=_keep, name="prefect server", daemon=True).start()
    return server.url


def find_server() -> str:
    """As :func:`use_server`, but none is started: for commands that want what a server knows.

    Raises:
        RuntimeError: none runs in this folder, or that of ``PREFECT_API_URL`` does not answer.
    """
    if not os.environ.get("PREFECT_API_URL") and running() is None:
        raise RuntimeError(
            "no Prefect server runs in this folder; `rollflow up` starts one with a worker, "
            "PREFECT_API_URL names one elsewhere"
        )
    return use_server()


def check_elsewhere(api: str) -> None:
    """Wait a little for a server that is not ours and may just be started again.

    Raises:
        RuntimeError: it does not answer.
    """
    begun = time.monotonic()
    while True:
        try:
            httpx.get(f"{api}/health", timeout=ELSEWHERE_S)
            return
        except httpx.HTTPError as error:
            if time.monotonic() - begun > ELSEWHERE_S:
                raise RuntimeError(
                    f"PREFECT_API_URL = {api}: no Prefect server answers there ({error!r}); start it, or "
                    "unset the variable to have one in this folder"
                ) from error
        time.sleep(0.5)


def running() -> LocalServer | None:
    """The local server, if it runs."""
    try:
        server = LocalServer(**json.loads(_record().read_text()))
    except (FileNotFoundError, ValueError, TypeError):  # none, or one that no version of ours wrote
        return None
    return server if server.alive() else None


def stop() -> bool:
    """End the local server; False if none runs."""
    server = running()
    if server is None:
        return False
    process = psutil.Process(server.pid)
    family = [process, *process.children(recursive=True)]
    process.send_signal(signal.SIGINT)
    _, alive = psutil.wait_procs(family, timeout=STOP_TIMEOUT_S)
    for left in alive:
        left.kill()
    return True


def _keep() -> None:
    """Start the server again, at the same address, whenever it has died."""
    while True:
        time.sleep(KEEP_EVERY_S)
        if running():  # without the lock: a flow that is suspended must not hold it
            continue
        try:
            _ensure()
        except (RuntimeError, OSError, Timeout) as error:
            print(f"the Prefect server is down and did not start again: {error}", file=sys.stderr)


def _ensure() -> LocalServer:
    """The server, started if it does not run; flows that ask at once share one.

    Its record is written before it answers, so that whoever comes next finds it if we are killed.
    """
    HOME.mkdir(parents=True, exist_ok=True)
    with _lock():
        for attempt in range(STARTS):
            server = running() or _start(_first_port() if attempt == 0 else _any_port())
            if _comes_up(server):
                return server
    tail = "\n".join(_log().read_text(errors="replace").splitlines()[-20:])
    raise RuntimeError(f"the Prefect server ended {STARTS} times before it answered:\n{tail}")


def _lock() -> AcquireReturnProxy:
    """The right to start the server, taken until the end of a ``with``."""
    lock = FileLock(HOME / "server.lock")
    try:
        return lock.acquire(timeout=TELL_AFTER_S)
    except Timeout:
        print("waiting for another command that starts the Prefect server", file=sys.stderr)
        return lock.acquire(timeout=START_TIMEOUT_S)


def _comes_up(server: LocalServer) -> bool:
    """Wait until it answers; False when it died, for one because its port was taken meanwhile.

    Raises:
        RuntimeError: it lives and does not answer in time.
    """
    begun = time.monotonic()
    told = False
    while server.alive():
        if _listens(server) and _healthy(server):
            return server.alive()
        waited = time.monotonic() - begun
        if waited > START_TIMEOUT_S:
            raise RuntimeError(
                f"waited {waited:.0f} s for the Prefect server (pid {server.pid}) at {server.url}: it "
                f"runs but does not answer; see {_log()}. It is left to start: try again, or end it by "
                "`rollflow down`"
            )
        if waited > TELL_AFTER_S and not told:
            print(f"starting the Prefect server at {server.url}", file=sys.stderr)
            told = True
        time.sleep(0.2)
    return False


def _start(port: int) -> LocalServer:
    address = ["--host", "127.0.0.1", "--port", str(port)]
    with _log().open("ab") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", "rollflow.flows.prefect_server", "server", "start", *address],
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=out,
            env={**os.environ, **_settings()},
            start_new_session=True,
        )
    started = psutil.Process(process.pid).create_time()
    server = LocalServer(url=f"http://127.0.0.1:{port}", pid=process.pid, started=started)
    unfinished = _record().with_suffix(f".{os.getpid()}")
    unfinished.write_text(json.dumps(asdict(server)))
    unfinished.replace(_record())
    return server


def _settings() -> dict[str, str]:
    return {
        "PREFECT_HOME": str(HOME.resolve()),
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_SERVER_EVENTS_RETENTION_PERIOD": EVENTS_KEPT,
        "PREFECT_CLOUD_ENABLE_ORCHESTRATION_TELEMETRY": "false",
        "DO_NOT_TRACK": "1",
    }


def _listens(server: LocalServer) -> bool:
    """Whether the server holds its port, and not another that was faster and answers there."""
    port = int(server.url.rpartition(":")[2])
    with contextlib.suppress(psutil.Error):
        process = psutil.Process(server.pid)
        for member in [process, *process.children(recursive=True)]:
            for connection in member.net_connections("tcp"):
                if connection.status == psutil.CONN_LISTEN and connection.laddr.port == port:
                    return True
    return False


def _healthy(server: LocalServer) -> bool:
    try:
        return httpx.get(f"{server.api_url}/health", timeout=2.0).status_code == 200
    except httpx.HTTPError:
        return False


def _record() -> Path:
    return HOME / "server.json"


def _log() -> Path:
    return HOME / "server.log"


def _first_port() -> int:
    """The port that this folder's server had last, or the first free one from 4200 on."""
    wanted: list[int] = []
    with contextlib.suppress(FileNotFoundError, ValueError, TypeError, KeyError):
        wanted = [int(json.loads(_record().read_text())["url"].rpartition(":")[2])]
    return _free_port([*wanted, *PORTS])


def _any_port() -> int:
    """Any free port: servers of many folders that start at once would race for the first."""
    return _free_port(random.sample(OTHER_PORTS, len(PORTS)))


def _free_port(wanted: list[int]) -> int:
    for port in wanted:
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("127.0.0.1", port))
            return port
    raise RuntimeError(f"no free port on 127.0.0.1 among {min(wanted)} to {max(wanted)}")
