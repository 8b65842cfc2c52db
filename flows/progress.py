"""What a person sees while a run goes on, and the numbers that are left afterwards."""

import asyncio
import statistics
import time
from collections.abc import Awaitable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self, TypeVar

from prefect.exceptions import Pause, TerminationSignal
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars

from rollflow.storage.objects import Store
from rollflow.storage.refs import BatchRef, RunRef, StepRef
from rollflow.storage.steps import read_steps
from rollflow.tasks.evaluate import stored_evaluations
from rollflow.tasks.preflight import RunPlan
from rollflow.tasks.report import Curve, write_picture

from .config import RunConfig
from .status import remove_status, write_status
from .telling import Telling
from .terminal import warnings_shown

T = TypeVar("T")
ENGINE_SECONDS = {
    "generate": "perf/generate_s",
    "score": "perf/score_s",
    "write": "perf/write_s",
    "train": "perf/train_s",
    "sync": "perf/sync_s",
}
"""Phases whose engines report the seconds that they worked; the rest of the wait is orchestration."""


@dataclass(frozen=True, slots=True)
class RunSummary:
    """How a run ended."""

    run: RunRef
    outcome: str
    evaluations: dict[int, dict[str, float]] = field(default_factory=dict)
    """Metrics of each evaluation, by the number of steps that the weights were trained."""
    picture: str = ""
    """URL of the reward curve."""
    tensorboard: str = ""
    seconds: float = 0.0
    iteration_split_s: dict[str, float] = field(default_factory=dict)
    """Median seconds of an iteration by phase, and ``total``."""
    perf: list[dict[str, float]] = field(default_factory=list)
    """Metrics ``perf/...`` of each step that this process trained, those of its push too."""
    logprob_gap_max: float = 0.0
    """Largest gap between trainer and rollout log-probabilities on any token of any step."""


class Progress:
    """The progress bar, the TensorBoard and the clock of a run."""

    def __init__(self, config: RunConfig, plan: RunPlan, label: str = "") -> None:
        """``label``: what the bar and the status file of an evaluation beside the training say in place
        of the run's name."""
        self._config, self._run = config, plan.run
        self._label = label or config.name
        self._is_beside = bool(label)
        self._telling = Telling(config, plan, beside=self._is_beside)
        self._step = plan.next_step
        self._evaluations: dict[int, dict[str, float]] = {}
        self._splits: list[dict[str, float]] = []
        self._phases: dict[str, float] = {}
        self._perf: list[dict[str, float]] = []
        self._gap_max = 0.0
        self._started = self._step_started = time.perf_counter()
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[numbers]}"),
        )
        self._bars = Bars(*columns, transient=False)
        self._shown = ExitStack()
        self._bar = self._bars.add_task(
            self._label, total=config.steps, completed=plan.next_step, numbers=""
        )

    def __enter__(self) -> Self:
        self._bars.start()
        self._shown.enter_context(warnings_shown(self._bars.console))
        self.show("start engines")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.show(ending(error))
        self._shown.close()
        self._bars.stop()
        self._telling.close()
        if self._is_beside:
            remove_status(self._label)

    def begin(self, step: int) -> None:
        """Start the clock of a step."""
        self._step, self._phases = step, {}
        self._step_started = time.perf_counter()

    async def time(self, phase: str, work: Awaitable[T]) -> T:
        """Await ``work`` and count its seconds to ``phase`` of the current step."""
        self.show(phase)
        started = time.perf_counter()
        try:
            return await work
        except Exception:
            self.show(f"{phase} failed")
            raise
        finally:
            self._phases[phase] = self._phases.get(phase, 0.0) + time.perf_counter() - started

    def show(self, phase: str) -> None:
        """Tell the person before the screen, and whoever reads the status file."""
        self._bars.update(self._bar, description=f"{self._label}: {phase}")
        write_status(self._label, self._step, phase)

    def end(self, record: StepRef, sync: Mapping[str, float]) -> dict[str, float]:
        """Close the step's clock; returns its metrics with the split of its seconds."""
        total = time.perf_counter() - self._step_started
        metrics = {**record.metrics, **sync}
        split = {
            phase: metrics.get(name, 0.0)
            for phase, name in ENGINE_SECONDS.items()
            if phase in self._phases
        }
        if "wait" in self._phases:
            split["wait"] = self._phases["wait"]
        split["commit"] = self._phases["commit"]
        split["orchestration"] = total - sum(split.values())
        self._splits.append({**split, "total": total})
        self._gap_max = max(self._gap_max, metrics.get("mismatch/logprob_gap_max", 0.0))
        reward, loss = metrics.get("rollout/reward"), metrics.get("train/loss", float("nan"))
        numbers = (
            f"reward {reward:.3f}  loss {loss:+.4f}" if reward is not None else f"loss {loss:.4f}"
        )
        self._bars.update(self._bar, completed=record.step + 1, numbers=f"{numbers}  {total:.2f} s")
        metrics |= {
            "perf/step_s": total,
            "perf/commit_s": split["commit"],
            "perf/orchestration_s": split["orchestration"],
        }
        self._perf.append({k: v for k, v in metrics.items() if k.startswith("perf/")})
        return metrics

    async def report(self, batch: BatchRef, record: StepRef, sync: Mapping[str, float]) -> None:
        """Close the step's clock and tell of the step: trackers, artifact, the run's page."""
        await self._telling.step(batch, self.end(record, sync))
        await self._arrivals()

    async def finish(self, outcome: str) -> RunSummary:
        """The last word on the run's page, and the summary."""
        await self._arrivals(now=True)
        await self._telling.finish(outcome)
        return self.summary(outcome)

    async def _arrivals(self, *, now: bool = False) -> None:
        for version, metrics in (await self._telling.arrivals(now=now)).items():
            self.evaluated(version, metrics)

    def evaluated(self, version: int, metrics: dict[str, float]) -> None:
        """Show an evaluation of the weights that were trained ``version`` steps."""
        if not metrics:
            return
        self._evaluations[version] = {**self._evaluations.get(version, {}), **metrics}
        self._telling.evaluated(version, metrics)
        shown = "  ".join(
            f"{k.removeprefix('eval/')} {v:.3f}"
            for k, v in metrics.items()
            if k.endswith("/reward")
        )
        self._bars.console.print(f"{self._config.name}: after {version} steps  {shown}")

    def summary(self, outcome: str) -> RunSummary:
        """Draw the reward curve and sum the run up."""
        return RunSummary(
            run=self._run,
            outcome=outcome,
            evaluations=self._evaluations,
            picture=write_picture(self._config.store, self._run, self._curves()),
            tensorboard=str(self._telling.folder),
            seconds=time.perf_counter() - self._started,
            iteration_split_s=median_split(self._splits),
            perf=self._perf,
            logprob_gap_max=self._gap_max,
        )

    def _curves(self) -> list[Curve]:
        steps = read_steps(Store(self._config.store), self._run)
        curves = [
            Curve(
                "training reward",
                [s.step for s in steps],
                [s.metrics["rollout/reward"] for s in steps if "rollout/reward" in s.metrics],
            )
        ]
        evaluations = stored_evaluations(self._config.store, self._run)
        for name in sorted({k for m in evaluations.values() for k in m if k.endswith("/reward")}):
            points = sorted((v, m[name]) for v, m in evaluations.items() if name in m)
            curves.append(Curve(name, [v for v, _ in points], [y for _, y in points]))
        return curves


def median_split(splits: list[dict[str, float]]) -> dict[str, float]:
    """Median seconds by phase, largest last ``total``; empty without steps."""
    phases = list(splits[0]) if splits else []
    return {p: statistics.median(s.get(p, 0.0) for s in splits) for p in phases}


def ending(error: BaseException | None) -> str:
    """How a flow ended, in a few words: of itself, or by what was raised."""
    if error is None:
        return "ended"
    if isinstance(error, Pause):
        return "suspended"
    if isinstance(error, asyncio.CancelledError | KeyboardInterrupt | TerminationSignal):
        return "cancelled"
    return f"failed: {str(error) or type(error).__name__}"
