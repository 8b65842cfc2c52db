"""A process of ours that ends when we do: an SGLang server, or the router."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any, Literal

from rollflow.engines.platform import Device, has_cuda, one_thread_env

from .forked import Forked

TAIL_LINES = 15

ENV = {
    # Longer than the router's 50 s: else it sends on a connection that the server is just closing.
    "SGLANG_TIMEOUT_KEEP_ALIVE": "120",
}
CUDA_ENV = {
    # /health answers without generating a token: a sleeping server has no memory to do it in.
    "SGLANG_ENABLE_HEALTH_ENDPOINT_GENERATION": "false",
    # Where the ends of a broadcast of weights find each other; the bytes go from GPU to GPU.
    "NCCL_SOCKET_IFNAME": os.environ.get("NCCL_SOCKET_IFNAME", "lo"),
}


class OwnedProcess:
    """Starts ``kind`` with ``arguments`` and keeps it: it cannot outlive this process.

    What it prints goes to ``log``. Kill it by :meth:`kill`; nothing it holds is worth a farewell.
    Without a GPU a server is a fork of a process that has SGLang imported, see :mod:`.forked`.
    """

    def __init__(
        self,
        kind: Literal["server", "router"],
        arguments: Mapping[str, Any],
        log: Path,
        device: Device,
    ) -> None:
        log.parent.mkdir(parents=True, exist_ok=True)
        self._log = log
        environment = {**os.environ, **ENV, **(_cpu_env() if device == "cpu" else CUDA_ENV)}
        start = _fork if kind == "server" and device == "cpu" and not has_cuda() else _start
        self._process, self._pipe = start(kind, arguments, log, environment)

    @property
    def pid(self) -> int:
        """Id of the guard, which also leads the session of everything that was started."""
        return self._process.pid

    @property
    def exit_code(self) -> int | None:
        """None while it runs."""
        return self._process.poll()

    @property
    def log(self) -> Path:
        """What it prints; until there is a fork that prints, what the fork server does."""
        if isinstance(self._process, Forked) and not self._process.started:
            return self._process.fork_log
        return self._log

    def tail(self) -> str:
        """The last lines of the log, for an error message."""
        try:
            lines = self.log.read_text(errors="replace").splitlines()
        except FileNotFoundError:  # a fork server's that nobody needed any more
            return ""
        return "\n".join(lines[-TAIL_LINES:])

    def kill(self, grace_s: float = 10.0) -> None:
        """End it and everything it started; returns when that is done."""
        self._pipe.close()
        try:
            self._process.wait(grace_s)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def _start(
    kind: str, arguments: Mapping[str, Any], log: Path, environment: Mapping[str, str]
) -> tuple[subprocess.Popen[bytes], IO[bytes]]:
    with log.open("ab") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "rollflow.engines.rollout.launch", kind],
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env=environment,
        )
    assert process.stdin is not None
    process.stdin.write(json.dumps(dict(arguments)).encode() + b"\n")
    process.stdin.flush()
    return process, process.stdin


def _fork(
    kind: str, arguments: Mapping[str, Any], log: Path, environment: Mapping[str, str]
) -> tuple[Forked, IO[bytes]]:
    read_end, write_end = os.pipe()
    pipe = os.fdopen(write_end, "wb")
    try:
        with log.open("ab") as output:
            return Forked(arguments, environment, read_end, output.fileno()), pipe
    except BaseException:
        pipe.close()
        raise
    finally:
        os.close(read_end)


def _cpu_env() -> dict[str, str]:
    return {
        **one_thread_env(),
        "SGLANG_USE_CPU_ENGINE": "1",
        "GLOO_SOCKET_IFNAME": os.environ.get("GLOO_SOCKET_IFNAME", "lo"),
        "TORCHDYNAMO_DISABLE": "1",  # what SGLang compiles takes longer to compile than to run here
    }
