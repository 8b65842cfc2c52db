"""What happens between two steps: checkpoints are announced, and a suspended run stops here."""

from collections.abc import Iterator
from contextlib import contextmanager

from rollflow.tasks.events import Announcements, end_told
from rollflow.tasks.pausing import StepBoundary, pausing_between_steps
from rollflow.tasks.preflight import RunPlan

from .config import RunConfig
from .terminal import outlive_the_reader

TOLD = {"evals", "regression", "cluster"}
"""Tables that an evaluation beside the run takes from it as it is now, not as it was created."""


class Operation:
    """The place between two steps of one run."""

    def __init__(self, config: RunConfig, boundary: StepBoundary) -> None:
        self._config, self._boundary = config, boundary
        self._announcements: Announcements | None = None

    def begin(self, plan: RunPlan) -> None:
        """The run goes on from ``plan``, whose checkpoint is announced if it was not."""
        self._announcements = Announcements(
            self._config.store,
            plan.run,
            self._config.model_dump(mode="json", include=TOLD),
            evaluate=self._config.checkpoint.evaluate,
            first=plan.checkpoint,
        )

    def is_last(self) -> bool:
        """Whether the flow run ends after the current step, because it was suspended."""
        return self._boundary.asked()

    async def saving(self, step: int) -> None:
        """The checkpoint of ``step`` was begun."""
        if self._announcements:
            self._announcements.saving(step)
            await self._announcements.tell()

    async def between_steps(self) -> None:
        """Tell of checkpoints that stand by now; end the flow run here if it was suspended."""
        if self._announcements:
            await self._announcements.tell()
        self._boundary.pause()


@contextmanager
def operated(config: RunConfig) -> Iterator[Operation]:
    """A run that a person may suspend; it stops between two steps, with its engines, and it outlives the
    worker that started it."""
    outlive_the_reader()
    with end_told(), pausing_between_steps() as boundary:
        yield Operation(config, boundary)
