"""A checkpoint's evaluation beside those of the ones before it."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from uuid import UUID

from rollflow.storage.refs import RunRef
from rollflow.tasks.evaluate import stored_evaluations
from rollflow.tasks.events import tell_regression
from rollflow.tasks.judging import show_evaluations, suspend, warn

from .config import RegressionConfig, RunConfig


@dataclass(frozen=True, slots=True)
class Regression:
    """A checkpoint that is worse than one before it."""

    metric: str
    value: float
    best: float
    """Of the weights that were trained ``best_version`` steps."""
    best_version: int
    action: str


async def judge(config: RunConfig, run: RunRef, version: int, training: str) -> None:
    """Show all evaluations of the run; where this one is a regression, say so and act on it.

    Args:
        training: id of the flow run that trains; empty where nothing is to be suspended.
    """
    evaluations = stored_evaluations(config.store, run)
    await show_evaluations(run, evaluations)
    if config.regression is None:
        return
    found = regression(config.regression, evaluations, version)
    if found is None:
        return
    tell_regression(run, version, asdict(found))
    back = f"rollflow fork {run.name} --step {found.best_version - 1} --into NEW"
    text = (
        f"{run.name}: {found.metric} is {found.value:.4f} after {version} steps and was "
        f"{found.best:.4f} after {found.best_version}; to go back: {back}"
    )
    warn(text)
    if found.action == "stop" and training:
        await suspend(UUID(training), text)


def regression(
    gate: RegressionConfig, evaluations: Mapping[int, Mapping[str, float]], version: int
) -> Regression | None:
    """Whether the weights of ``version`` are worse than the best of lower versions.

    A late evaluation speaks for its own version and is never compared with weights that were trained
    longer; version 0, the first weights, is no checkpoint that one could go back to.
    """
    values = {v: m[gate.metric] for v, m in evaluations.items() if gate.metric in m}
    before = {v: x for v, x in values.items() if 0 < v < version}
    if version not in values or not before:
        return None
    pick = min if gate.lower_is_better else max
    best = pick(before, key=lambda v: before[v])
    if not gate.worse(values[version], before[best]):
        return None
    return Regression(gate.metric, values[version], before[best], best, gate.action)
