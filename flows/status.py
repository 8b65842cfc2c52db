"""What a run is doing right now: one small JSON file a run, for ``rollflow status`` and for scripts."""

import json
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

FOLDER = Path(".rollflow/status")


@dataclass(frozen=True, slots=True)
class Status:
    """Step and phase of a run, and the process of its flow."""

    run: str
    step: int
    phase: str
    pid: int
    since: float
    """Seconds since 1970."""

    @property
    def alive(self) -> bool:
        """Whether the flow's process still runs."""
        return psutil.pid_exists(self.pid)


def write_status(run: str, step: int, phase: str) -> None:
    """Replace the run's status file."""
    folder = FOLDER.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f".{run}.{os.getpid()}"
    temporary.write_text(json.dumps(asdict(Status(run, step, phase, os.getpid(), time.time()))))
    temporary.replace(folder / f"{run}.json")


def read_status(run: str) -> Status | None:
    """The status of one run of the working folder; None where no flow of it ever ran here."""
    try:
        return Status(**json.loads((FOLDER / f"{run}.json").read_text()))
    except FileNotFoundError:
        return None


def read_statuses() -> list[Status]:
    """All runs of the working folder, by name."""
    return [Status(**json.loads(file.read_text())) for file in sorted(FOLDER.glob("*.json"))]
