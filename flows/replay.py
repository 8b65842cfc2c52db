"""Training again from the log alone: the proof that it is a pure function of the log."""

import statistics
import time
from dataclasses import dataclass

from prefect import flow

from rollflow.storage.config import StoreConfig
from rollflow.tasks.engines import restore_checkpoint, running_engines
from rollflow.tasks.recompute import Difference, Stretch, compare, read_log, scratch_plan
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

    Where the run went on on another number of ranks, so does this. Nothing is written to the run.

    Raises:
        ValueError: there is no such run, or a step's batch is not the one that its record names.
    """
    log = read_log(store, name)
    seconds: list[float] = []
    recomputed: list[tuple[Stretch, dict[int, str]]] = []
    for stretch in log.stretches():
        config = build_config(stretch.settings(log))
        plan = scratch_plan(store, name, stretch)
        digests: dict[int, str] = {}
        async with running_engines(config, plan, rollout=False) as engines:
            await restore_checkpoint(config, plan, engines)
            for entry in stretch.entries:
                started = time.perf_counter()
                digests[entry.step] = (await train_step(engines, entry.batch)).weights_digest
                seconds.append(time.perf_counter() - started)
        recomputed.append((stretch, digests))
    return Recomputation(compare(log, recomputed), statistics.median(seconds) if seconds else 0.0)
