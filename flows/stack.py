"""The local stack: Prefect server, deployments and a worker, kept alive by one process.

``rollflow up`` starts that process and returns; ``rollflow up --foreground`` is it, for systemd, a
container or a terminal. Nothing here imports Prefect before its server's address is known.
"""

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType

import psutil

from . import server

START_TIMEOUT_S = 300.0
STOP_TIMEOUT_S = 60.0
"""A worker that is stopped ends its flows first, which stop their engines."""
PAUSES_S = (1.0, 2.0, 4.0, 8.0, 16.0, 30.0)
"""Between the ends of a worker that dies at once and its next start."""
LIVED_S = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Keeper(server.KeptProcess):
    """The process that keeps server and worker alive, as kept in ``.rollflow/prefect/stack.json``."""

    worker: int = 0
    """Process id of the worker; 0 before it was first started."""
    worker_started: float = 0.0
    """Start time of the worker's process, which with its id names it for sure."""
    ready: bool = False
    """Whether everything is deployed and the worker was started."""


def up(at_once: int = 1, beside: int = 1) -> str:
    """Start the stack unless it runs; the server's URL once all is up.

    ``at_once``, ``beside``: runs at the same time in either queue.

    Raises:
        RuntimeError: it ended before that, or took too long; gives the end of its log.
    """
    server.HOME.mkdir(parents=True, exist_ok=True)
    keeper = running()
    if keeper is None:
        if api := os.environ.get("PREFECT_API_URL"):
            server.check_elsewhere(api)
        limits = ("--at-once", str(at_once), "--beside", str(beside))
        with _log().open("ab") as out:
            process = subprocess.Popen(
                [sys.executable, "-m", "rollflow", "up", "--foreground", *limits],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                start_new_session=True,
            )
        keeper = Keeper(pid=process.pid, started=psutil.Process(process.pid).create_time())
    begun = time.monotonic()
    while keeper.alive():
        if (found := running()) and found.ready:
            return _url()
        if time.monotonic() - begun > START_TIMEOUT_S:
            raise RuntimeError(
                f"waited {START_TIMEOUT_S:.0f} s for the local stack (pid {keeper.pid}); see {_log()}, "
                "and `rollflow down` to end it"
            )
        time.sleep(0.2)
    tail = "\n".join(_log().read_text(errors="replace").splitlines()[-15:])
    raise RuntimeError(f"the local stack ended before it was up:\n{tail}")


def keep(at_once: int, beside: int) -> None:
    """Be the process that keeps the stack: until it gets SIGTERM or SIGINT.

    Raises:
        RuntimeError: another process keeps the stack of this folder already.
    """
    if (other := running()) and other.pid != os.getpid():
        raise RuntimeError(f"the stack of this folder runs already (pid {other.pid})")
    ended: list[int] = []

    def end(number: int, _: FrameType | None) -> None:
        ended.append(number)

    signal.signal(signal.SIGTERM, end)
    signal.signal(signal.SIGINT, end)
    process = worker()  # that of a keeper that was killed, with its flows
    _write(_me(process))
    server.use_server()
    from .deployments import Placement, deploy

    asyncio.run(deploy(Placement(folder=Path.cwd(), at_once=at_once, beside=beside)))
    _write(_me(process, ready=process is not None))
    failures, started = 0, time.monotonic()
    try:
        while not ended:
            if process is None or _has_ended(process):
                if process is not None:
                    failures = 0 if time.monotonic() - started > LIVED_S else failures + 1
                    print("the worker ended; starting it again")
                    _pause(PAUSES_S[min(failures, len(PAUSES_S) - 1)], ended)
                if not ended:
                    process, started = start_worker(), time.monotonic()
                    _write(_me(process, ready=True))
            time.sleep(0.2)
    finally:
        if process is not None:
            _end(process)
        _record().unlink(missing_ok=True)


def worker() -> psutil.Process | None:
    """The worker of this folder's stack, if it runs; it outlives a keeper that was killed."""
    with contextlib.suppress(FileNotFoundError, psutil.NoSuchProcess):
        kept = Keeper(**json.loads(_record().read_text()))
        process = psutil.Process(kept.worker) if kept.worker else None
        if process and abs(process.create_time() - kept.worker_started) < 1.0:
            return None if process.status() == psutil.STATUS_ZOMBIE else process
    return None


def _has_ended(process: psutil.Process) -> bool:
    try:
        process.wait(0)
    except psutil.TimeoutExpired:
        return False
    return True


def start_worker() -> psutil.Process:
    """Start a worker of the pool in this folder; hooks of the folder can be imported by its flows."""
    from .deployments import POOL

    paths = [str(Path.cwd()), *filter(None, [os.environ.get("PYTHONPATH")])]
    return psutil.Popen(
        [sys.executable, "-m", "prefect", "worker", "start", "--pool", POOL, "--type", "process"],
        stdin=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        start_new_session=True,
    )


def running() -> Keeper | None:
    """The process that keeps the stack of this folder, if it runs."""
    try:
        keeper = Keeper(**json.loads(_record().read_text()))
    except FileNotFoundError:
        return None
    return keeper if keeper.alive() else None


def down() -> list[str]:
    """End worker, flows and server of this folder; what was ended."""
    ended: list[str] = []
    if keeper := running():
        process = psutil.Process(keeper.pid)
        process.send_signal(signal.SIGTERM)
        _, alive = psutil.wait_procs([process], timeout=STOP_TIMEOUT_S + 10)
        for left in alive:
            left.kill()
        ended.append("worker")
    if (orphan := worker()) is not None:
        _end(orphan)
        ended.append("worker" if not ended else "another worker")
    _record().unlink(missing_ok=True)
    if server.stop():
        ended.append("Prefect server")
    return ended


def _end(worker: psutil.Process) -> None:
    """End a worker: it is asked to, and so are its flows; what does not end in time is killed."""
    with contextlib.suppress(psutil.NoSuchProcess):
        family = [worker, *worker.children(recursive=True)]
        worker.send_signal(signal.SIGTERM)
        _, alive = psutil.wait_procs(family, timeout=STOP_TIMEOUT_S)
        for left in alive:
            with contextlib.suppress(psutil.NoSuchProcess):
                left.kill()


def _pause(seconds: float, ended: list[int]) -> None:
    until = time.monotonic() + seconds
    while time.monotonic() < until and not ended:
        time.sleep(0.1)


def _me(worker: psutil.Process | None, *, ready: bool = False) -> Keeper:
    return Keeper(
        pid=os.getpid(),
        started=psutil.Process().create_time(),
        worker=worker.pid if worker else 0,
        worker_started=worker.create_time() if worker else 0.0,
        ready=ready,
    )


def _write(keeper: Keeper) -> None:
    server.HOME.mkdir(parents=True, exist_ok=True)
    temporary = _record().with_suffix(".new")
    temporary.write_text(json.dumps(asdict(keeper)))
    temporary.replace(_record())


def _record() -> Path:
    return server.HOME / "stack.json"


def _log() -> Path:
    return server.HOME / "stack.log"


def _url() -> str:
    if api := os.environ.get("PREFECT_API_URL"):
        return api.removesuffix("/api")
    local = server.running()
    return local.url if local else "no server"
