"""Whether a process of this machine is certainly gone, told from /proc."""

import os
import socket
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Process:
    """One process, for ever: a number that is given out again is another process."""

    host: str
    boot_id: str
    """The machine's current start; empty where there is no /proc."""
    namespace: str
    """The namespace of process numbers, which every container has its own of."""
    pid: int
    started: int
    """Clock ticks from the machine's start to the process's."""


def this_process() -> Process:
    """Describe the calling process."""
    try:
        boot_id = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        namespace = str(Path("/proc/self/ns/pid").readlink())
        _, started = _stat(os.getpid())
    except OSError:
        return Process(socket.gethostname(), "", "", os.getpid(), 0)
    return Process(socket.gethostname(), boot_id, namespace, os.getpid(), started)


def is_gone(process: Process) -> bool:
    """Tell whether the process has certainly ended.

    False wherever that cannot be known: on another machine, in another container, before the
    machine was started anew, without /proc. A suspended process is not gone.
    """
    here = this_process()
    place = (process.host, process.boot_id, process.namespace)
    if not here.boot_id or place != (here.host, here.boot_id, here.namespace):
        return False
    try:
        os.kill(process.pid, 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        pass
    try:
        state, started = _stat(process.pid)
    except OSError:  # hidden from us, or ended between the two looks: the next one will tell
        return False
    return state in "ZX" or started != process.started


def _stat(pid: int) -> tuple[str, int]:
    """Give the state's letter and the start of a process; its name may hold blanks and brackets."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return fields[0], int(fields[19])
