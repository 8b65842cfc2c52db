"""A checkpoint's evaluation beside those of the ones before it."""

from uuid import UUID

from rollflow.storage.refs import RunRef
from rollflow.tasks.evaluate import stored_evaluations
from rollflow.tasks.events import tell_regression
from rollflow.tasks.judging import show_evaluations, suspend, warn

from .config import RunConfig


async def judge(config: RunConfig, run: RunRef, version: int, training: str) -> None:
    """Show all evaluations of the run; where this one is a regression, say so and act on it.

    Compared is with the best of lower versions, whatever order they came in: a late evaluation
    speaks for its own version and is never compared with weights that were trained longer.

    Args:
        training: id of the flow run that trains; empty where nothing is to be suspended.
    """
    evaluations = stored_evaluations(config.store, run)
    await show_evaluations(run, evaluations)
    gate = config.regression
    if gate is None or gate.metric not in evaluations.get(version, {}):
        return
    value = evaluations[version][gate.metric]
    before = {v: m[gate.metric] for v, m in evaluations.items() if v < version and gate.metric in m}
    if not before:
        return
    pick = min if gate.lower_is_better else max
    best = pick(before, key=lambda v: before[v])
    if not gate.worse(value, before[best]):
        return
    facts = {
        "metric": gate.metric,
        "value": value,
        "best": before[best],
        "best_version": best,
        "action": gate.action,
    }
    tell_regression(run, version, facts)
    warn(
        f"{run.name}: {gate.metric} is {value:.4f} after {version} steps and was {before[best]:.4f} "
        f"after {best}; to go back: rollflow fork {run.name} --step {best - 1} --into NEW"
    )
    if gate.action == "stop" and training:
        await suspend(UUID(training), f"{gate.metric} fell to {value:.4f} after {version} steps")
