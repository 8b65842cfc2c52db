"""Show what a step did: TensorBoard scalars, a Prefect artifact, a picture of the reward."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import httpx
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from prefect import get_run_logger, task
from prefect.artifacts import acreate_table_artifact
from prefect.cache_policies import NO_CACHE
from tensorboard.compat.proto.event_pb2 import Event  # pyright: ignore[reportAttributeAccessIssue]
from tensorboard.compat.proto.summary_pb2 import Summary  # pyright: ignore[reportAttributeAccessIssue]
from tensorboard.summary.writer.event_file_writer import EventFileWriter

from rollflow.storage.config import StoreConfig
from rollflow.storage.objects import Store
from rollflow.storage.refs import BatchRef, RunRef


@dataclass(frozen=True, slots=True)
class Curve:
    """One line of the picture: a metric by step."""

    label: str
    steps: Sequence[int]
    values: Sequence[float]


@task(name="report", cache_policy=NO_CACHE)
async def report(board: "Board", batch: BatchRef, metrics: Mapping[str, float]) -> None:
    """Write the step's scalars to TensorBoard and a table with a link to its shards to Prefect."""
    board.write(batch.step, metrics)
    try:
        await _artifact(batch, metrics)
    except httpx.HTTPError as error:  # a picture of the step is not worth the step
        get_run_logger().warning("no artifact for step %d: %r", batch.step, error)


async def _artifact(batch: BatchRef, metrics: Mapping[str, float]) -> None:
    await acreate_table_artifact(
        key=artifact_key(batch.run.name, "iteration"),
        table=[
            {"metric": name, "value": f"{value:.6g}"} for name, value in sorted(metrics.items())
        ],
        description=f"Run `{batch.run.name}`, step {batch.step}. Samples: `{batch.url}`",
    )


class Board:
    """TensorBoard scalars of one run, written under ``.rollflow/tensorboard/<run>``.

    Scalars have slash names. ``rollout/``, ``train/``, ``perf/`` and ``mismatch/`` are counted by
    step, ``eval/`` by the number of steps that the weights were trained.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._writer = EventFileWriter(str(folder))

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Add one event with all ``metrics`` at ``step``."""
        values = [Summary.Value(tag=name, simple_value=value) for name, value in metrics.items()]
        self._writer.add_event(Event(step=step, summary=Summary(value=values)))

    def close(self) -> None:
        """Write out what is buffered."""
        self._writer.close()


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
