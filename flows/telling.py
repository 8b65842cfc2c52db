"""Who is told of a run: its trackers and its page in Prefect, by the flow that trains alone."""

import asyncio
import time
from collections.abc import Mapping
from pathlib import Path

from rollflow.storage.objects import Store
from rollflow.storage.refs import BatchRef
from rollflow.storage.steps import read_steps
from rollflow.tasks.config import ReportConfig
from rollflow.tasks.evaluate import stored_evaluations
from rollflow.tasks.page import Page
from rollflow.tasks.preflight import RunPlan
from rollflow.tasks.report import report
from rollflow.tasks.trackers import Trackers

from .config import RunConfig


class Telling:
    """Steps and evaluations of one run, passed on as they come.

    An evaluation ``beside`` the training writes to TensorBoard alone: W&B's run, the Prometheus port and
    the page belong to the training, which finds the results in the store.
    """

    def __init__(self, config: RunConfig, plan: RunPlan, *, beside: bool) -> None:
        self._config, self._run, self._beside = config, plan.run, beside
        told = ReportConfig() if beside else config.report
        self._trackers = Trackers(told, plan.run, config.model_dump(mode="json"))
        self._page = Page(plan.run, config.steps, config.report.page_every_s)
        self._known: set[tuple[str, int]] = set()
        """Evaluations that were passed on: dataset and version."""
        self._looked = 0.0
        if not beside:
            self._recall(plan)

    @property
    def folder(self) -> Path:
        """Where TensorBoard's events are."""
        return self._trackers.folder

    async def step(self, batch: BatchRef, metrics: Mapping[str, float]) -> None:
        """A step was committed."""
        artifact = self._config.report.shows(batch.step, self._config.steps)
        await report(self._trackers, self._config.store, batch, metrics, artifact=artifact)
        self._page.add(batch.step, metrics)
        await self._page.update("training")

    def evaluated(self, version: int, metrics: Mapping[str, float]) -> None:
        """The weights that were trained ``version`` steps were evaluated, here or beside."""
        self._known |= {(name.split("/")[1], version) for name in metrics}
        self._trackers.write(version, metrics)
        self._page.evaluated(version, metrics)

    async def arrivals(self, *, now: bool = False) -> dict[int, dict[str, float]]:
        """Evaluations that flow runs beside this one have committed since the last look, by version.

        Looks as often as the page is updated; whatever order they come in, each has its version.
        """
        every_s = self._config.report.page_every_s
        if not self._config.checkpoint.evaluate or (
            not now and time.monotonic() - self._looked < every_s
        ):
            return {}
        self._looked = time.monotonic()
        store, known = self._config.store, frozenset(self._known)
        return await asyncio.to_thread(stored_evaluations, store, self._run, known)

    async def finish(self, outcome: str) -> None:
        """The last word on the run's page."""
        if not self._beside:
            await self._page.update(outcome, now=True)

    def close(self) -> None:
        """Write out what is buffered."""
        self._trackers.close()

    def _recall(self, plan: RunPlan) -> None:
        """What the run did before it was gone on with; the trackers have that already."""
        for step in read_steps(Store(self._config.store), plan.run):
            if step.step < plan.next_step:
                self._page.add(step.step, step.metrics)
        for version, metrics in stored_evaluations(self._config.store, plan.run).items():
            self._known |= {(name.split("/")[1], version) for name in metrics}
            self._page.evaluated(version, metrics)
