"""What the orchestration of an iteration costs, with engines that compute nothing: time and database."""

import itertools
import json
import os
import statistics
import tempfile
import time
from datetime import datetime
from pathlib import Path
from typing import Any

import httpx
from rich.console import Console

from rollflow.flows import server
from rollflow.flows.arguments import build_config
from rollflow.flows.recipes import arithmetic
from rollflow.flows.train import train
from rollflow.storage.objects import Store
from rollflow.storage.runs import run_ref
from rollflow.storage.steps import read_step_records

STEPS = int(os.environ.get("ROLLFLOW_BENCH_STEPS", "2000"))
SETTLES_S = 900.0
"""The server writes task runs and events after the fact; the database is measured once it has."""
QUIET_S = 10.0


async def measure(console: Console) -> dict[str, Any]:
    """Train ``STEPS`` steps twice: every task told to Prefect, and those of each tenth step."""
    found: dict[str, Any] = {"steps": STEPS}
    for name, every in (("every step told", 1), ("each tenth step told", 10)):
        console.print(f"{STEPS} iterations with engines that compute nothing, {name}")
        found[name] = facts = await _run(every)
        console.print(
            f"  {facts['median_ms']:.0f} ms an iteration at the median (first tenth "
            f"{facts['first_ms']:.0f}, last tenth {facts['last_ms']:.0f}, worst {facts['worst_ms']:.0f}); "
            f"Prefect's database grows by {facts['database_kb']:.1f} KB an iteration "
            f"({facts['settled_s']:.0f} s until it was written); run page {facts['page_s']:.2f} s",
            highlight=False,
        )
    return found


async def _run(every: int) -> dict[str, Any]:
    before = _database_bytes()
    with tempfile.TemporaryDirectory() as folder:
        files = arithmetic.make(Path(folder) / "arithmetic")
        config = build_config(
            {
                "name": f"orchestration-{every}-{os.getpid()}",
                "steps": STEPS,
                "model": {"path": str(files.model), "random_weights": True},
                "data": {"path": str(files.train)},
                "rollout": {
                    "reward": "rollflow.engines.rewards.exact_match:exact_match",
                    "batch_size": 4,
                    "sampling": {"max_new_tokens": 4},
                },
                "cluster": {"address": "null", "device": "cpu"},
                "store": {"url": f"{folder}/store"},
                "report": {"every": every, "tasks_every": every},
            }
        )
        await train(config)
        store = Store(config.store)
        records = read_step_records(store, run_ref(store, config.name))
    times = [datetime.fromisoformat(record.committed_at).timestamp() for record in records]
    steps_ms = [1000 * (b - a) for a, b in itertools.pairwise(times)]
    tenth = max(1, len(steps_ms) // 10)
    settled_s = _settle()
    return {
        "median_ms": statistics.median(steps_ms),
        "first_ms": statistics.median(steps_ms[:tenth]),
        "last_ms": statistics.median(steps_ms[-tenth:]),
        "worst_ms": max(steps_ms),
        "settled_s": settled_s,
        "database_kb": (_database_bytes() - before) / 1024 / STEPS,
        "page_s": _page_s(config.name),
    }


def _settle() -> float:
    """Wait until the database has stopped growing; seconds that it took."""
    begun = changed = time.monotonic()
    size = _database_bytes()
    while time.monotonic() - changed < QUIET_S and time.monotonic() - begun < SETTLES_S:
        time.sleep(0.5)
        if (now := _database_bytes()) != size:
            size, changed = now, time.monotonic()
    return changed - begun


def _database_bytes() -> int:
    """Size of the local server's database with what is not yet merged into it."""
    return sum(file.stat().st_size for file in server.HOME.glob("prefect.db*"))


def _page_s(name: str) -> float:
    """Seconds that the server takes for what the UI's page of the flow run asks."""
    local = server.running()
    if local is None:
        return float("nan")
    with httpx.Client(base_url=local.api_url, timeout=60) as client:
        chosen = {"flow_runs": {"name": {"any_": [name]}}}
        run = client.post("/flow_runs/filter", json=chosen).json()[0]
        of_run = {"flow_run_id": {"any_": [run["id"]]}}
        begun = time.perf_counter()
        for path, body in (
            (f"/flow_runs/{run['id']}/graph-v2", None),
            ("/logs/filter", {"logs": of_run, "limit": 200}),
            ("/task_runs/filter", {"task_runs": of_run, "limit": 50}),
            ("/task_runs/count", {"task_runs": of_run}),
            ("/artifacts/filter", {"artifacts": of_run, "limit": 50}),
        ):
            answer = client.get(path) if body is None else client.post(path, json=body)
            json.loads(answer.text)
        return time.perf_counter() - begun
