"""A local stack for tests: server, worker and engines that compute nothing, in a folder of its own."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import httpx

from rollflow.flows.recipes import arithmetic
from rollflow.storage.config import StoreConfig
from rollflow.storage.objects import Store
from rollflow.storage.refs import RunRef
from rollflow.storage.runs import open_run

# Steps take a tenth of a second: a server that is told of each is busy with nothing else.
CONFIG = """
name = "null"
steps = 100000
[cluster]
address = "null"
device = "cpu"
[model]
path = "arithmetic/model"
random_weights = true
[data]
path = "arithmetic/train.jsonl"
[rollout]
batch_size = 4
servers = 1
reward = "rollflow.engines.rewards.exact_match:exact_match"
sampling = { max_new_tokens = 4 }
[report]
every = 20
tasks_every = 20
[[evals]]
name = "heldout"
data = { path = "arithmetic/heldout.jsonl" }
sampling = { max_new_tokens = 4 }
"""
DEADLINE_S = 120.0
POLL_S = 0.1


class Stack:
    """One stack, and what a person would do with it."""

    def __init__(self, folder: Path, environment: Mapping[str, str] | None = None) -> None:
        """``environment`` may name a Prefect server that runs already, and the store's credentials."""
        self.folder, self.environment = folder, dict(environment or {})
        arithmetic.make(folder / "arithmetic")
        (folder / "run.toml").write_text(CONFIG)
        self.rollflow("up")
        self.api = self.environment.get("PREFECT_API_URL", "")
        self.server: dict[str, Any] = {}
        if not self.api:
            self.server = json.loads((folder / ".rollflow/prefect/server.json").read_text())
            self.api = f"{self.server['url']}/api"
        user, _, password = self.environment.get("PREFECT_API_AUTH_STRING", "").partition(":")
        self._auth = (user, password) if user else None

    def rollflow(self, *words: str) -> str:
        """Call the command in the folder; its output."""
        environment = {k: v for k, v in os.environ.items() if not k.startswith("PREFECT_")}
        environment |= self.environment
        done = subprocess.run(
            [sys.executable, "-m", "rollflow", *words],
            cwd=self.folder, capture_output=True, text=True, timeout=400, env=environment,
        )  # fmt: skip
        assert done.returncode == 0, f"{' '.join(words)}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    def post(self, path: str, **body: Any) -> Any:
        """Ask the server."""
        answer = httpx.post(f"{self.api}/{path}", json=body, timeout=60, auth=self._auth)
        answer.raise_for_status()
        return answer.json()

    def flow_runs(self, name: str) -> list[dict[str, Any]]:
        """Flow runs of a name, the newest first."""
        chosen = {"name": {"any_": [name]}}
        return self.post("flow_runs/filter", flow_runs=chosen, sort="EXPECTED_START_TIME_DESC")

    def state(self, name: str) -> str:
        """Name of the state of the newest flow run of a name."""
        found = self.flow_runs(name)
        return found[0]["state_name"] if found else "none"

    def artifact(self, key: str) -> str:
        """Data of the newest artifact of a key."""
        found = self.post(
            "artifacts/filter", artifacts={"key": {"any_": [key]}}, sort="CREATED_DESC"
        )
        return str(found[0]["data"]) if found else ""

    def status(self, run: str) -> dict[str, Any]:
        """What the run's status file says; step -1 before there is one."""
        try:
            return json.loads((self.folder / f".rollflow/status/{run}.json").read_text())
        except FileNotFoundError:
            return {"step": -1, "phase": "", "pid": 0}

    def stored(self, run: str) -> tuple[Store, RunRef]:
        """The store and the run in it."""
        store = Store(StoreConfig(url=str(self.folder / ".rollflow/store")))
        return store, open_run(store, run)

    def wait(self, what: str, ready: Callable[[], Any], deadline_s: float = DEADLINE_S) -> float:
        """Wait until ``ready``; seconds that it took. AssertionError names what did not come."""
        begun = time.monotonic()
        while not ready():
            if time.monotonic() - begun > deadline_s:
                log = (self.folder / ".rollflow/prefect/stack.log").read_text()[-3000:]
                raise AssertionError(f"waited {deadline_s:.0f} s for: {what}\n{log}")
            time.sleep(POLL_S)
        return time.monotonic() - begun
