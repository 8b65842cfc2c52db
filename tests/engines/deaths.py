"""Processes that a test kills, and that are dead when it goes on."""

import contextlib
import time
from collections.abc import Iterable

import psutil


def kill(processes: Iterable[psutil.Process], within_s: float = 10.0) -> None:
    """Returns when all are dead, and with that their connections closed; zombies are dead."""
    deadline = time.monotonic() + within_s
    processes = [*processes]
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):  # it died of the death of another
            process.kill()
    while alive := [*filter(is_alive, processes)]:
        assert time.monotonic() < deadline, f"{alive} outlived SIGKILL by {within_s:g} s"
        time.sleep(0.005)


def is_alive(process: psutil.Process) -> bool:
    try:
        return process.status() not in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
    except psutil.NoSuchProcess:
        return False
