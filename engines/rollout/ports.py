"""Free ports on loopback that two runs on one machine never both take."""

import fcntl
import os
import random
import socket
import tempfile
from pathlib import Path

PORTS = range(20_000, 32_000)
"""Below the ports that the kernel gives to outgoing connections."""


class PortLease:
    """A free port, e.g. ``PortLease().port``; other leases avoid it while this one is held.

    The lease is a file lock, so it ends with the process that holds it, whatever ended that.
    """

    def __init__(self) -> None:
        folder = Path(tempfile.gettempdir()) / f"rollflow-ports-{os.getuid()}"
        folder.mkdir(mode=0o700, exist_ok=True)
        for port in random.SystemRandom().sample(PORTS, 200):
            lock = os.open(folder / str(port), os.O_RDWR | os.O_CREAT, 0o600)
            if _lock(lock) and _is_free(port):
                self.port = port
                self._lock = lock
                return
            os.close(lock)
        raise RuntimeError(f"no free port on 127.0.0.1 in {PORTS} after 200 tries")

    def release(self) -> None:
        """Let others take the port."""
        os.close(self._lock)


def _lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True
