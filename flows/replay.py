"""Training again from the log alone: the proof that it is a pure function of the log."""

import statistics
import time
from dataclasses import dataclass

from prefect import flow

from rollflow.storage.config import StoreConfig
from rollflow.tasks.engines import running_engines
from rollflow.tasks.recompute import Difference, compare, read_log, scratch_plan
from rollflow.tasks.train import train_step

from .arguments import build_config


@dataclass(frozen=True, slots=True)
class Recomputation:
    """What training a run again from its log gave."""

    differences: list[Difference]
    """Steps and checkpoints whose weights came out different from what the log says; empty if the
    whole run was reproduced bit for bit."""
    step_s: float
    """Median seconds of a step that is done again."""


@flow(name="recompute", flow_run_name="recompute {name}")
async def recompute(store: StoreConfig, name: str) -> Recomputation:
    """Train every committed batch of a run again, no rollout engine started, from its first weights.

    Nothing is written to the run.

    Raises:
        ValueError: there is no such run, or a step's batch is not the one that its record names.
    """
    log = read_log(store, name)
    config = build_config(log.settings)
    differences: list[Difference] = []
    seconds: list[float] = []
    async with running_engines(config, scratch_plan(store, name), rollout=False) as engines:
        for entry in log.entries:
            started = time.perf_counter()
            result = await train_step(engines, entry.batch)
            seconds.append(time.perf_counter() - started)
            differences += compare(entry, result.weights_digest)
    return Recomputation(differences, statistics.median(seconds) if seconds else 0.0)
