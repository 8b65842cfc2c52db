"""A process of ours that ends when we do: an SGLang server, or the router."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from rollflow.engines.platform import Device, one_thread_env

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
    """

    def __init__(
        self,
        kind: Literal["server", "router"],
        arguments: Mapping[str, Any],
        log: Path,
        device: Device,
    ) -> None:
        log.parent.mkdir(parents=True, exist_ok=True)
        self.log = log
        with log.open("ab") as output:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "rollflow.engines.rollout.launch", kind],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env={**os.environ, **ENV, **(_cpu_env() if device == "cpu" else CUDA_ENV)},
            )
        assert self._process.stdin is not None
        self._pipe = self._process.stdin
        self._pipe.write(json.dumps(dict(arguments)).encode() + b"\n")
        self._pipe.flush()

    @property
    def pid(self) -> int:
        """Id of the guard, which also leads the session of everything that was started."""
        return self._process.pid

    @property
    def exit_code(self) -> int | None:
        """None while it runs."""
        return self._process.poll()

    def tail(self) -> str:
        """The last lines of the log, for an error message."""
        lines = self.log.read_text(errors="replace").splitlines()
        return "\n".join(lines[-TAIL_LINES:])

    def kill(self, grace_s: float = 10.0) -> None:
        """End it and everything it started; returns when that is done."""
        self._pipe.close()
        try:
            self._process.wait(grace_s)
        except subprocess.TimeoutExpired:
            self._process.send_signal(signal.SIGKILL)
            self._process.wait()


def _cpu_env() -> dict[str, str]:
    return {
        **one_thread_env(),
        "SGLANG_USE_CPU_ENGINE": "1",
        "GLOO_SOCKET_IFNAME": os.environ.get("GLOO_SOCKET_IFNAME", "lo"),
        "TORCHDYNAMO_DISABLE": "1",  # what SGLang compiles takes longer to compile than to run here
    }
