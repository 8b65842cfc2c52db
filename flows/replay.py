"""Training again from the log alone: the proof that it is a pure function of the log."""

from prefect import flow

from rollflow.storage.config import StoreConfig
from rollflow.tasks.engines import running_engines
from rollflow.tasks.recompute import Difference, compare, read_log, scratch_plan
from rollflow.tasks.train import train_step

from .arguments import build_config


@flow(name="recompute", flow_run_name="recompute {name}")
async def recompute(store: StoreConfig, name: str) -> list[Difference]:
    """Train every committed batch of a run again, no rollout engine started, from its first weights.

    Nothing is written to the run.

    Returns:
        Steps and checkpoints whose weights came out different from what the log says; empty if the
        whole run was reproduced bit for bit.
    """
    log = read_log(store, name)
    config = build_config(log.settings)
    differences: list[Difference] = []
    async with running_engines(config, scratch_plan(store, name), rollout=False) as engines:
        for entry in log.entries:
            result = await train_step(engines, entry.batch)
            differences += compare(entry, result.weights_digest)
    return differences
