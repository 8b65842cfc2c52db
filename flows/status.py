"""What a run is doing right now: one small JSON file a run, for ``rollflow status`` and for scripts."""

import json
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import httpx
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
    temporary = FOLDER / f".{run}.{os.getpid()}"
    text = json.dumps(asdict(Status(run, step, phase, os.getpid(), time.time())))
    try:
        temporary.write_text(text)
    except FileNotFoundError:
        FOLDER.mkdir(parents=True, exist_ok=True)
        temporary.write_text(text)
    temporary.replace(FOLDER / f"{run}.json")


def remove_status(run: str) -> None:
    """Forget what is over and has no successor: an evaluation beside a training."""
    (FOLDER / f"{run}.json").unlink(missing_ok=True)


def read_status(run: str) -> Status | None:
    """The status of one run of the working folder; None where no flow of it ever ran here."""
    try:
        return Status(**json.loads((FOLDER / f"{run}.json").read_text()))
    except FileNotFoundError:
        return None


def server_lines(api_url: str) -> list[tuple[str, str, str]]:
    """Flow runs of ours that have not ended, on a Prefect server: name, flow's tag and state.

    Asks the server directly, without Prefect's slow import. httpx.HTTPError where it does not answer.
    """
    states = {"type": {"any_": ["SCHEDULED", "PENDING", "RUNNING", "PAUSED", "CANCELLING"]}}
    chosen = {"tags": {"all_": ["rollflow"]}, "state": states}
    asked = {"flow_runs": chosen, "sort": "EXPECTED_START_TIME_ASC", "limit": 50}
    user, _, password = os.environ.get("PREFECT_API_AUTH_STRING", "").partition(":")
    auth = (user, password) if user else None
    answer = httpx.post(f"{api_url}/flow_runs/filter", json=asked, timeout=10.0, auth=auth)
    answer.raise_for_status()
    return [
        (run["name"], " ".join(t for t in run["tags"] if t != "rollflow"), run["state_name"])
        for run in answer.json()
    ]


def read_statuses() -> list[Status]:
    """All runs of the working folder, by name."""
    return [Status(**json.loads(file.read_text())) for file in sorted(FOLDER.glob("*.json"))]
