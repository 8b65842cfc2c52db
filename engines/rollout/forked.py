"""A server that is a fork of the :mod:`.fork_server`, as its owner has it."""

import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .fork_finding import connect
from .fork_server import HOLDERS, name_of

COMMAND = (sys.executable, "-P", "-m", "rollflow.engines.rollout.launch", "fork-server")
UNKNOWN = 255
"""Exit code of a server whose fork server was killed, so that nobody learned it."""
TOLD_S = 1.0
"""Seconds that a fork server has to tell of a server's end, once that has ended."""
START_S = 120.0
"""Seconds for the imports, where somebody wants to know a server's id before it answers."""


class Forked:
    """A server's guard that the fork server made, with the verbs of a ``subprocess.Popen``.

    Whoever makes one does not wait for the fork server's imports; :attr:`pid` does. The fork server is
    kept until :meth:`wait` returns.
    """

    def __init__(
        self,
        arguments: Mapping[str, Any],
        environment: Mapping[str, str],
        stdin: int,
        output: int,
        command: Sequence[str] = COMMAND,
    ) -> None:
        """``stdin`` and ``output`` are descriptors, which the caller closes."""
        self._exit_code: int | None = None
        self._pid: int | None = None
        self._pidfd: int | None = None
        self._told = True
        self._connection, self.fork_log = connect(environment, command)
        request = {
            "arguments": dict(arguments),
            "environment": dict(environment),
            "folder": str(Path.cwd()),
        }
        with os.fdopen(os.memfd_create("request"), "wb") as text:
            text.write(json.dumps(request).encode())
            text.flush()
            with contextlib.suppress(OSError):  # it is gone already: poll tells
                socket.send_fds(self._connection, [b"1"], [text.fileno(), stdin, output])

    @property
    def started(self) -> bool:
        """Whether there is a process yet."""
        return self._pid is not None

    @property
    def pid(self) -> int:
        """Waits for the fork server's imports.

        Raises:
            RuntimeError: it ended before it made the server, or took too long.
        """
        deadline = time.monotonic() + START_S
        while self._pid is None:
            left = deadline - time.monotonic()
            if left <= 0 or self._exit_code is not None:
                what = "ended" if left > 0 else f"took over {START_S:.0f} s"
                raise RuntimeError(
                    f"the fork server {what} before it made a server; {self.fork_log}"
                )
            self._hear(left)
        return self._pid

    def poll(self) -> int | None:
        """The exit code once it has ended."""
        self._hear(0)
        self._hear(0)  # the start and the end may both have been told
        return self._exit_code

    def wait(self, timeout_s: float | None = None) -> int:
        """The exit code, once it has ended; lets the fork server go. Close ``stdin`` before.

        Where the server was not made yet it never will be, and there is nothing to wait for.
        Raises subprocess.TimeoutExpired where it does not end in that time.
        """
        self.poll()
        deadline = time.monotonic() + (timeout_s or float("inf"))
        while self.started and self._exit_code is None:
            if (left := deadline - time.monotonic()) <= 0:
                raise subprocess.TimeoutExpired("server", timeout_s or 0)
            self._hear(left)
        return self._close()

    def kill(self) -> None:
        """SIGKILL, which ends what the guard guards too."""
        if self._pidfd is not None:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)

    def _close(self) -> int:
        self._connection.close()
        if self._pidfd is not None:
            os.close(self._pidfd)
        self._pidfd = None
        self._exit_code = UNKNOWN if self._exit_code is None else self._exit_code
        return self._exit_code

    def _hear(self, timeout_s: float) -> None:
        """Take in the next thing that happens within this time."""
        if self._exit_code is not None:
            return
        poll, connection = select.poll(), self._connection.fileno()
        if self._told:
            poll.register(connection, select.POLLIN)
        if self._pidfd is not None:
            poll.register(self._pidfd, select.POLLIN)
        found = dict(poll.poll(None if timeout_s == float("inf") else timeout_s * 1000))
        if not found:
            return
        if self._told and self._pidfd in found and connection not in found:
            poll.unregister(self._pidfd)  # it has ended: how is told now, or never
            found = dict(poll.poll(TOLD_S * 1000))
        message = self._receive() if connection in found else {"exit_code": UNKNOWN}
        self._pid = message.get("pid", self._pid)
        self._exit_code = message.get("exit_code")
        if not message:  # the fork server was killed; the guard lives on
            self._told = False
            self._exit_code = UNKNOWN if self._pidfd is None else None

    def _receive(self) -> dict[str, int]:
        try:
            text, descriptors, _, _ = socket.recv_fds(self._connection, 1024, 1)
        except OSError:
            return {}
        for descriptor in descriptors:
            self._pidfd = descriptor
        return json.loads(text) if text else {}


def hold() -> None:
    """Keep fork servers that this process, or any that it starts from now on, makes use of, as long as it lives."""
    held = os.environ.get(HOLDERS, "").split()
    if (mine := name_of(os.getpid())) not in held:
        os.environ[HOLDERS] = " ".join([*held, mine])
