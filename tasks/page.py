"""The page of a run in Prefect: its newest numbers and its plots, one artifact that is updated."""

import asyncio
import base64
import time
from collections.abc import Mapping
from io import BytesIO
from uuid import UUID

import httpx
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from prefect import get_client, get_run_logger
from prefect.artifacts import acreate_markdown_artifact
from prefect.client.schemas.actions import ArtifactUpdate

from rollflow.storage.refs import RunRef

from .report import artifact_key

PLOTS = (
    ("reward", ("rollout/reward",)),
    ("loss", ("train/loss",)),
    ("mismatch KL, rollout to trainer", ("mismatch/kl",)),
    ("tokens per second", ("perf/tokens_per_s",)),
)
POINTS = 500
"""Points of a line at most: of a longer run each point is the mean of several steps."""


class Page:
    """What has happened in a run so far, and the artifact that shows it.

    One flow run has one artifact, whose data are replaced, so that a run of any length leaves one row
    in Prefect's database.
    """

    def __init__(self, run: RunRef, steps: int, every_s: float) -> None:
        self._run, self._steps, self._every_s = run, steps, every_s
        self._metrics: dict[int, Mapping[str, float]] = {}
        self._evaluations: dict[int, Mapping[str, float]] = {}
        self._artifact: UUID | None = None
        self._updated = 0.0

    def add(self, step: int, metrics: Mapping[str, float]) -> None:
        """A committed step."""
        self._metrics[step] = dict(metrics)

    def evaluated(self, version: int, metrics: Mapping[str, float]) -> None:
        """An evaluation of the weights that were trained ``version`` steps, whenever it comes."""
        self._evaluations[version] = {**self._evaluations.get(version, {}), **metrics}

    async def update(self, phase: str, *, now: bool = False) -> None:
        """Show it, unless it was shown a moment ago and need not be ``now``."""
        if not now and time.monotonic() - self._updated < self._every_s:
            return
        self._updated = time.monotonic()
        text = await asyncio.to_thread(self.markdown, phase)
        try:
            if self._artifact is None:
                made = await acreate_markdown_artifact(
                    key=artifact_key(self._run.name, "run"),
                    markdown=text,
                    description=f"Run `{self._run.name}`",
                )
                self._artifact = UUID(str(made))
            else:
                async with get_client() as client:
                    await client.update_artifact(self._artifact, ArtifactUpdate(data=text))
        except httpx.HTTPError as error:  # the page is not worth the run
            get_run_logger().warning("the page of the run was not updated: %r", error)

    def markdown(self, phase: str) -> str:
        """The page: where the run stands, its plots, its evaluations."""
        done = max(self._metrics, default=-1) + 1
        parts = [f"# {self._run.name}: step {done} of {self._steps}, {phase}", f"`{self._run.url}`"]
        if self._metrics:
            picture = base64.b64encode(self._draw()).decode()
            parts.append(
                f"![reward, loss, mismatch and throughput](data:image/png;base64,{picture})"
            )
        if self._evaluations:
            names = sorted({n for m in self._evaluations.values() for n in m if _is_told(n)})
            rows = [
                f"| {version} | " + " | ".join(_number(metrics.get(n)) for n in names) + " |"
                for version, metrics in sorted(self._evaluations.items())
            ]
            head = f"| steps trained | {' | '.join(names)} |\n|{'---|' * (len(names) + 1)}"
            parts += ["## Evaluations", "\n".join([head, *rows])]
        if self._metrics:
            newest = self._metrics[done - 1]
            rows = [f"| {name} | {value:.6g} |" for name, value in sorted(newest.items())]
            parts += [f"## Step {done - 1}", "\n".join(["| metric | value |\n|---|---|", *rows])]
        return "\n\n".join(parts)

    def _draw(self) -> bytes:
        figure = Figure(figsize=(9, 5), layout="constrained")
        FigureCanvasAgg(figure)
        for axes, (title, names) in zip(figure.subplots(2, 2).flat, PLOTS, strict=True):
            for name in names:
                steps, values = _thinned(
                    [(s, m[name]) for s, m in sorted(self._metrics.items()) if name in m]
                )
                axes.plot(steps, values, linewidth=1.2, marker="." if len(steps) < 30 else "")
            axes.set_title(title, fontsize=9)
            axes.tick_params(labelsize=7)
            axes.grid(alpha=0.3)
        buffer = BytesIO()
        figure.savefig(buffer, format="png", dpi=80)
        return buffer.getvalue()


def _thinned(points: list[tuple[int, float]]) -> tuple[list[float], list[float]]:
    each = -(-len(points) // POINTS) or 1
    groups = [points[i : i + each] for i in range(0, len(points), each)]
    return (
        [sum(s for s, _ in g) / len(g) for g in groups],
        [sum(v for _, v in g) / len(g) for g in groups],
    )


def _is_told(name: str) -> bool:
    return name.endswith(("/reward", "/loss")) or "/pass@" in name or "/avg@" in name


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"
