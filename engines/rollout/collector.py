"""Fills the groups of one batch: generates, scores and writes, each as soon as it can be done."""

import asyncio
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from rollflow.engines.hooks import GenerateContext, GenerateFn
from rollflow.storage.samples import Prompt, Sample, Status
from rollflow.storage.shards import Part, ShardWriter

from .client import GenerationError
from .engine import RolloutEngine
from .grader import Grader, failed
from .server import ServerError
from .tally import Tally


@dataclass(frozen=True, slots=True)
class Episode:
    """One execution of the generate function that is to be done."""

    prompt: Prompt
    context: GenerateContext


class Collector:
    """One batch. :meth:`generate`, then :meth:`score`, then :meth:`write`; nothing is dropped.

    A sample whose generate function raises is kept as failed, with the reason; a fault of the
    servers that outlasts every retry is raised instead, for no sample of it is the prompt's fault.
    """

    def __init__(
        self,
        engine: RolloutEngine,
        function: GenerateFn,
        grader: Grader,
        writer: ShardWriter,
        concurrency: int,
        shard_groups: int,
    ) -> None:
        self._engine = engine
        self._function = function
        self._grader = grader
        self._writer = writer
        self._slots = asyncio.Semaphore(concurrency)
        self._write_lock = asyncio.Lock()
        self._shard_groups = shard_groups
        self._scoring: list[asyncio.Task[None]] = []
        self._finished: list[list[Sample]] = []
        self._append: asyncio.Task[Part] | None = None
        self.generated = 0
        """Samples so far; the tally has those that are scored."""
        self.tally = Tally()
        self.errors: Counter[str] = Counter()
        """Why samples failed, and how often each."""
        self.seconds = {"generate_s": 0.0, "score_s": 0.0, "write_s": 0.0}

    def adopt(self, group: list[Sample]) -> None:
        """Take a group that an earlier attempt finished and made durable, as it is."""
        self.generated += len(group)
        self.tally.add(group)
        self._finished.append(group)

    async def generate(self, groups: Sequence[Sequence[Episode]]) -> None:
        """Generate every episode; scoring and writing of finished groups go on meanwhile."""
        started = time.monotonic()
        try:
            async with asyncio.TaskGroup() as tasks:
                for group in groups:
                    tasks.create_task(self._generate_group(group))
        except BaseExceptionGroup as errors:
            await self.cancel()
            raise _first(errors) from errors
        except asyncio.CancelledError:
            await self.cancel()
            raise
        self.seconds["generate_s"] = time.monotonic() - started

    async def score(self) -> None:
        """Wait for the graders that still run."""
        started = time.monotonic()
        await asyncio.gather(*self._scoring)
        self.seconds["score_s"] = time.monotonic() - started

    async def write(self) -> tuple[Part, ...]:
        """Write what is finished and not yet written; give all parts of the batch."""
        started = time.monotonic()
        await self._write_shard(at_least=1)
        self.seconds["write_s"] += time.monotonic() - started
        return self._writer.parts

    async def cancel(self) -> None:
        """Stop scoring and writing; when this returns, nothing more is written to the folder."""
        for task in self._scoring:
            task.cancel()
        await asyncio.gather(*self._scoring, return_exceptions=True)
        if self._append is not None:
            await asyncio.wait({self._append})

    async def _generate_group(self, group: Sequence[Episode]) -> None:
        async with asyncio.TaskGroup() as tasks:
            episodes = [tasks.create_task(self._generate_episode(e)) for e in group]
        samples = [sample for task in episodes for sample in task.result()]
        numbered = [replace(sample, index=i) for i, sample in enumerate(samples)]
        self.generated += len(numbered)
        self._scoring.append(asyncio.create_task(self._finish_group(numbered)))

    async def _generate_episode(self, episode: Episode) -> list[Sample]:
        async with self._slots:
            try:
                result = await self._function(self._engine, episode.prompt, episode.context)
            except (GenerationError, ServerError):
                raise
            except Exception as error:  # noqa: BLE001 - the function is the user's: it may raise anything
                return [_lost(episode, repr(error))]
        samples = result if isinstance(result, list) else [result]
        return samples or [_lost(episode, "the generate function returned no sample")]

    async def _finish_group(self, samples: list[Sample]) -> None:
        scored = list(await asyncio.gather(*(self._grader.score(s) for s in samples)))
        self.tally.add(scored)
        failures = [s for s in scored if s.status is Status.FAILED]
        self.errors.update(str(s.metadata.get("error", "")) for s in failures)
        self._finished.append(scored)
        await self._write_shard(at_least=self._shard_groups)

    async def _write_shard(self, at_least: int) -> None:
        async with self._write_lock:
            if len(self._finished) < at_least:
                return
            groups, self._finished = self._finished, []
            rows = [sample for group in groups for sample in group]
            # A thread cannot be cancelled: it is waited for where the batch is given up.
            self._append = asyncio.create_task(asyncio.to_thread(self._writer.append, rows))
            await asyncio.shield(self._append)


def _lost(episode: Episode, error: str) -> Sample:
    context = episode.context
    sample = context.sample(
        episode.prompt, "", [], [], "", [], status=Status.FAILED, finish_reason="error"
    )
    return failed(sample, error)


def _first(errors: BaseExceptionGroup[BaseException]) -> BaseException:
    error = errors.exceptions[0]
    return _first(error) if isinstance(error, BaseExceptionGroup) else error
