"""Show what a step did: scalars to the trackers, an artifact in Prefect, a picture of the reward."""

import asyncio
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO

import httpx
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from prefect import get_run_logger
from prefect.artifacts import acreate_markdown_artifact

from rollflow.storage.config import StoreConfig
from rollflow.storage.glance import Glance, Transcript, glance
from rollflow.storage.objects import Store
from rollflow.storage.refs import BatchRef, RunRef

from .grain import step_task
from .trackers import Trackers

BINS = 10
BAR = 30
"""Characters of the longest bar of the histogram."""
SHOWN = 1500
"""Characters of a prompt or response that are shown."""


@dataclass(frozen=True, slots=True)
class Curve:
    """One line of the picture: a metric by step."""

    label: str
    steps: Sequence[int]
    values: Sequence[float]


@step_task("report")
async def report(
    trackers: Trackers,
    store: StoreConfig,
    batch: BatchRef,
    metrics: Mapping[str, float],
    *,
    artifact: bool,
) -> None:
    """Give the step's scalars to the trackers, and to Prefect an ``artifact`` of the step if asked to."""
    await asyncio.to_thread(trackers.write, batch.step, metrics)
    if not artifact:
        return
    seen = await asyncio.to_thread(glance, Store(store), batch)
    try:
        await acreate_markdown_artifact(
            key=artifact_key(batch.run.name, "iteration"),
            markdown=iteration_page(batch, metrics, seen),
            description=f"Run `{batch.run.name}`, step {batch.step}",
        )
    except httpx.HTTPError as error:  # a picture of the step is not worth the step
        get_run_logger().warning("no artifact for step %d: %r", batch.step, error)


def iteration_page(batch: BatchRef, metrics: Mapping[str, float], seen: Glance) -> str:
    """One step as Markdown: metrics, histogram of the rewards, best, median and worst answer."""
    rows = "\n".join(f"| {name} | {value:.6g} |" for name, value in sorted(metrics.items()))
    parts = [
        f"# {batch.run.name}, step {batch.step}",
        f"{batch.rows} samples in {batch.groups} groups: `{batch.url}`",
        f"    rollflow rollouts show {batch.run.name} --step {batch.step}",
        "## Rewards",
        f"```\n{histogram(seen.rewards)}\n```",
        *([f"{seen.failed} samples failed and have no reward."] if seen.failed else []),
    ]
    for word, found in (("Best", seen.best), ("Median", seen.median), ("Worst", seen.worst)):
        if found:
            parts += [f"## {word}: reward {found.reward:.6g}", _transcript(batch, found)]
    return "\n\n".join([*parts, f"## Metrics\n\n| metric | value |\n|---|---|\n{rows}"])


def histogram(values: Sequence[float], bins: int = BINS) -> str:
    """Counts as bars of text, one line a bin: its lower end, its count; one bin for equal values."""
    if not values:
        return "no sample has a reward"
    low, high = min(values), max(values)
    if low == high:
        return f"{low:10.4g}  {'█' * BAR} {len(values)}"
    counts = [0] * bins
    for value in values:
        counts[min(int((value - low) / (high - low) * bins), bins - 1)] += 1
    lines: list[str] = []
    for number, count in enumerate(counts):
        bar = "█" * round(BAR * count / max(counts)) or ("▏" if count else "")
        lines.append(f"{low + (high - low) * number / bins:10.4g}  {bar} {count}")
    return "\n".join(lines)


def _transcript(batch: BatchRef, found: Transcript) -> str:
    fence = "`" * max(3, _longest_fence(found.prompt), _longest_fence(found.response))
    label = f", label `{_one_line(found.label)}`" if found.label else ""
    return (
        f"`{found.sample_id}`, {found.status}{label}\n\n"
        f"{fence}\n{_cut(found.prompt)}\n{fence}\n\n{fence}\n{_cut(found.response)}\n{fence}\n\n"
        f"    rollflow rollouts show {batch.run.name} --sample {found.sample_id}"
    )


def _longest_fence(text: str) -> int:
    return 1 + max((len(ticks) for ticks in re.findall("`+", text)), default=0)


def _cut(text: str) -> str:
    return (
        text if len(text) <= SHOWN else f"{text[:SHOWN]}\n... {len(text) - SHOWN} characters more"
    )


def _one_line(text: str) -> str:
    return text.replace("\n", " ").replace("`", "'")[:80]


def write_picture(store: StoreConfig, run: RunRef, curves: Sequence[Curve]) -> str:
    """Draw the curves to ``reward.png`` in the run's prefix; returns its URL."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for curve in curves:
        axes.plot(
            curve.steps,
            curve.values,
            label=curve.label,
            marker="." if len(curve.steps) < 50 else "",
        )
    axes.set(title=run.name, xlabel="step", ylabel="reward")
    axes.grid(alpha=0.3)
    axes.legend()
    buffer = BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    url = f"{run.url}/reward.png"
    Store(store).put_atomic(url, buffer.getvalue())
    return url


def artifact_key(*words: str) -> str:
    """A key as Prefect wants it: lower-case letters, digits and dashes."""
    return re.sub(r"[^a-z0-9]+", "-", "-".join(words).lower()).strip("-")
