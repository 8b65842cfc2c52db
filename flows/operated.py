"""Flows as a person starts them in the Prefect UI: a stored run by its name, not by its settings."""

from typing import Any

from prefect import flow

from rollflow.storage.config import StoreConfig
from rollflow.storage.objects import Store
from rollflow.storage.runs import read_run
from rollflow.tasks.events import end_told
from rollflow.tasks.restarts import refuse_crash_loop

from .arguments import build_config, merged
from .config import RunConfig
from .derive import RescoreSummary, replay, rescore
from .derived import gated
from .evaluate import evaluate
from .judging import judge
from .progress import RunSummary

DEFAULT_STORE = StoreConfig()


@flow(name="evaluate", flow_run_name="evaluate {run}", retries=2, retry_delay_seconds=10)
async def evaluate_run(
    run: str,
    step: int | None = None,
    store: StoreConfig = DEFAULT_STORE,
    settings: dict[str, Any] | None = None,
    training: str = "",
) -> RunSummary:
    """Evaluate a checkpoint of a stored run on engines of its own; the run may go on meanwhile.

    Args:
        run: name of the run.
        step: step of the checkpoint, counted from 0; the newest unless given.
        store: where the run is kept.
        settings: tables and settings laid over those that the run was created with, e.g. `evals`.
        training: id of the flow run that trains: it is suspended where `regression.action` is `stop`
            and the checkpoint is worse than an earlier one.
    """
    await refuse_crash_loop(f"evaluation of {run}")
    with end_told():
        config = stored_config(store, run, settings)
        summary = await evaluate.fn(config, step)
        for version in summary.evaluations:
            await judge(config, summary.run, version, training)
        return summary


@flow(name="replay", flow_run_name="replay {run} into {into}")
async def replay_run(
    run: str,
    into: str,
    first: int = 0,
    end: int | None = None,
    store: StoreConfig = DEFAULT_STORE,
    settings: dict[str, Any] | None = None,
) -> RunSummary:
    """Train on the stored batches of a run again, as a run of another name; nothing generates.

    Args:
        run: name of the run whose batches are trained on.
        into: name of the new run.
        first: step to begin with; above 0 it needs the checkpoint of the step before.
        end: step to end before; after the last unless given.
        store: where the runs are kept.
        settings: tables and settings laid over those of the run.
    """
    await refuse_crash_loop(into)
    with end_told():
        over = {**(settings or {}), "name": into}
        config, _ = gated(stored_config(store, run, over), run, asked="gates" in over)
        return await replay.fn(config, run, first, end)


@flow(name="rescore", flow_run_name="rescore {run} into {into}")
async def rescore_run(
    run: str,
    into: str,
    reward: str,
    first: int = 0,
    end: int | None = None,
    store: StoreConfig = DEFAULT_STORE,
) -> RescoreSummary:
    """Score the stored samples of a run again; the new run holds the new rewards beside the old.

    Args:
        run: name of the run whose samples are scored.
        into: name of the new run.
        reward: the reward function, pkg.mod:fn.
        first: step to begin with.
        end: step to end before; after the last unless given.
        store: where the runs are kept.
    """
    await refuse_crash_loop(into)
    with end_told():
        config = stored_config(store, run, {"name": into, "rollout": {"reward": reward}})
        return await rescore.fn(config, run, first, end)


def stored_config(
    store: StoreConfig, run: str, settings: dict[str, Any] | None = None
) -> RunConfig:
    """The settings that a run was created with, and ``settings`` over them, table by table.

    Raises:
        ValueError: there is no such run, or a setting is wrong.
    """
    record = read_run(Store(store), run)
    standing = {**record.settings, "store": store.model_dump(mode="json")}
    kind = (settings or {}).get("algorithm", {}).get("name")
    if kind and kind != standing["algorithm"]["name"]:  # keeps nothing of the old kind
        standing["algorithm"] = {}
    return build_config(merged(standing, settings or {}))
