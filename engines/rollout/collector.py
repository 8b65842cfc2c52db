"""Fills the groups of one batch: generates, scores and writes, each as soon as it can be done."""

import asyncio
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from rollflow.engines.hooks import GenerateContext, GenerateFn
from rollflow.storage.samples import Prompt, Sample, Status
from rollflow.storage.shards import Part, ShardWriter

from .client import GenerateClient, GenerationError, Scope, requests_of
from .engine import RolloutEngine
from .filters import DynamicFilter
from .grader import Grader, failed
from .server import ServerError
from .tally import Tally
from .trained_on import TrainedOn

CUT_GRACE_S = 10.0
"""Seconds that a generate function may take to return once its requests were cut off."""


@dataclass(frozen=True, slots=True)
class Episode:
    """One execution of the generate function that is to be done."""

    prompt: Prompt
    context: GenerateContext
    finished: tuple[Sample, ...] = ()
    """What an earlier step made of it, where that was finished: it is not done again."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a group."""

    order: int
    """Its place among those that were issued."""
    samples: list[Sample]
    reason: str = ""
    """Why it is no member of the batch; empty for a member."""

    @property
    def group_id(self) -> str:
        return self.samples[0].group_id


Annotate = Callable[[Sequence[Sample]], Awaitable[list[Sample]]]
"""Adds to a finished group's metadata what other models make of it, before it is scored."""
Wave = Callable[[], Awaitable[Sequence[Sequence[Episode]]]]
"""Further groups to generate; empty where there are no more."""


@dataclass(slots=True)
class _Running:
    order: int
    episodes: Sequence[Episode]
    scope: Scope = field(default_factory=Scope)
    done: dict[int, list[Sample]] = field(default_factory=dict[int, list[Sample]])
    """Samples of the episodes that returned, by their place."""

    def so_far(self) -> list[Sample]:
        """What there is of every episode."""
        found = [self.done.get(i) or [_not_begun(e)] for i, e in enumerate(self.episodes)]
        return _numbered([sample for samples in found for sample in samples])


class Collector:
    """One batch. :meth:`generate` or :meth:`fill`, then :meth:`write`; nothing is dropped.

    A sample whose generate function raises is kept as failed, with the reason; a fault of the
    servers that outlasts every retry is raised instead, for no sample of it is the prompt's fault.
    ``slots`` bounds the episodes in flight; batches that are collected at once share it.
    """

    def __init__(
        self,
        engine: RolloutEngine,
        function: GenerateFn,
        grader: Grader,
        writer: ShardWriter,
        slots: asyncio.Semaphore,
        shard_groups: int,
        *,
        client: GenerateClient | None = None,
        dynamic_filter: DynamicFilter | None = None,
        trained_on: TrainedOn | None = None,
        annotate: Annotate | None = None,
    ) -> None:
        self._engine = engine
        self._function = function
        self._grader = grader
        self._writer = writer
        self._slots = slots
        self._client = client
        self._filter = dynamic_filter
        self._trained_on = trained_on
        self._annotate = annotate
        self._write_lock = asyncio.Lock()
        self._shard_groups = shard_groups
        self._unwritten: list[list[Sample]] = []
        self._append: asyncio.Task[Part] | None = None
        self._last_generated = 0.0
        self._issued = 0
        self._tally: Tally | None = None
        """Counts over the members that there are now, once somebody has asked."""
        self.outcomes: list[Outcome] = []
        """Every group so far, in the order in which they were decided."""
        self.seconds = {"generate_s": 0.0, "score_s": 0.0, "write_s": 0.0}

    async def adopt(self, samples: list[Sample]) -> None:
        """Take a group that an earlier attempt finished and made durable, as it is."""
        self._decide(self._issued, samples)
        self._issued += 1
        await self._write_shard(at_least=self._shard_groups)

    async def generate(self, groups: Sequence[Sequence[Episode]]) -> None:
        """Generate and score every episode; writing of finished groups goes on meanwhile."""

        async def no_more() -> Sequence[Sequence[Episode]]:
            return ()

        await self.fill(len(groups), no_more, early=False, first=groups)

    async def fill(
        self,
        target: int,
        next_wave: Wave,
        *,
        early: bool,
        first: Sequence[Sequence[Episode]] = (),
    ) -> None:
        """Generate ``first`` and, until ``target`` groups are members, further groups as needed.

        With ``early`` the first so many that are finished are the members, and the others are cut
        off where they stand. Without, everything that was issued is finished, and members are
        taken in the order of issue. GroupsExhaustedError where there are no more groups to ask for.
        """
        started = self._last_generated = time.monotonic()
        running: dict[asyncio.Task[list[Sample]], _Running] = {}
        running.update(self._start(group) for group in first)
        try:
            while True:
                while self._members() + len(running) < target:
                    wave = await next_wave()
                    if not wave:
                        raise GroupsExhaustedError(self._exhausted(target))
                    running.update(self._start(group) for group in wave)
                if (early and self._members() >= target) or not running:
                    break
                await self._finish_some(running)
            await self._cut(running)
        except BaseException:
            for task in running:
                task.cancel()
            await asyncio.gather(*running, return_exceptions=True)
            await self.cancel()
            raise
        self._choose(target, early)
        self.seconds["generate_s"] = self._last_generated - started
        self.seconds["score_s"] = time.monotonic() - self._last_generated

    @property
    def members(self) -> list[Outcome]:
        """The batch's groups."""
        return [outcome for outcome in self.outcomes if not outcome.reason]

    @property
    def others(self) -> list[Outcome]:
        """Groups that were generated, or begun, and are no members."""
        return [outcome for outcome in self.outcomes if outcome.reason]

    @property
    def tally(self) -> Tally:
        """Counts over the members."""
        if self._tally is None:
            self._tally = Tally()
            for outcome in self.members:
                self._tally.add(outcome.samples)
        return self._tally

    @property
    def errors(self) -> Counter[str]:
        """Why samples of members failed, and how often each."""
        samples = [s for o in self.members for s in o.samples if s.status is Status.FAILED]
        return Counter(str(s.metadata.get("error", "")) for s in samples)

    @property
    def timings(self) -> dict[str, float]:
        """Seconds by phase, and tokens of the members, as scalars by slash name."""
        tokens = self.tally.tokens
        return {
            **{f"perf/{name}": seconds for name, seconds in self.seconds.items()},
            "perf/tokens": float(tokens),
            "perf/tokens_per_s": tokens / max(self.seconds["generate_s"], 1e-9),
        }

    async def write(self) -> tuple[Part, ...]:
        """Write what is finished and not yet written; give all parts of the batch."""
        started = time.monotonic()
        await self._write_shard(at_least=1)
        self.seconds["write_s"] += time.monotonic() - started
        return self._writer.parts

    async def cancel(self) -> None:
        """When this returns, nothing more is written to the folder."""
        if self._append is not None:
            await asyncio.wait({self._append})

    def _members(self) -> int:
        return sum(not outcome.reason for outcome in self.outcomes)

    def _start(self, group: Sequence[Episode]) -> tuple[asyncio.Task[list[Sample]], _Running]:
        running = _Running(self._issued, group)
        self._issued += 1
        return asyncio.create_task(self._group(running)), running

    async def _finish_some(self, running: dict[asyncio.Task[list[Sample]], _Running]) -> None:
        done, _ = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
        for task in sorted(done, key=lambda t: running[t].order):
            samples = task.result()
            self._decide(running.pop(task).order, samples)
            await self._write_shard(at_least=self._shard_groups)

    async def _cut(self, running: dict[asyncio.Task[list[Sample]], _Running]) -> None:
        """End what still runs; its samples hold what they have by now."""
        if not running:
            return
        for group in running.values():
            group.scope.cut = True
        if self._client is not None:
            await asyncio.gather(*(self._client.cut(g.scope) for g in running.values()))
        _, late = await asyncio.wait(running, timeout=CUT_GRACE_S)
        for task in late:
            task.cancel()
        await asyncio.wait(running)
        for task, group in running.items():
            samples = group.so_far() if task.cancelled() else task.result()
            self._decide(group.order, samples, CUT if task.cancelled() else "")
        running.clear()

    def _decide(self, order: int, samples: list[Sample], reason: str = "") -> None:
        if any(sample.status is Status.ABORTED for sample in samples):
            reason = CUT
        elif not reason and self._filter is not None:
            reason = self._filter(samples)
        self.outcomes.append(Outcome(order, samples, reason))
        self._tally = None
        if any(sample.response_ids or sample.status is not Status.ABORTED for sample in samples):
            self._unwritten.append(samples)

    def _choose(self, target: int, early: bool) -> None:
        """Members beyond the target are surplus: the last that were decided, or issued."""
        members = self.members
        if not early:
            members = sorted(members, key=lambda outcome: outcome.order)
        self._tally = None
        surplus = {outcome.group_id for outcome in members[target:]}
        self.outcomes = [
            replace(outcome, reason=SURPLUS) if outcome.group_id in surplus else outcome
            for outcome in self.outcomes
        ]

    async def _group(self, running: _Running) -> list[Sample]:
        tasks = [
            asyncio.create_task(self._episode(i, episode, running))
            for i, episode in enumerate(running.episodes)
        ]
        try:
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
        self._last_generated = time.monotonic()
        samples = running.so_far()
        if any(sample.status is Status.ABORTED for sample in samples):
            return samples
        if self._annotate is not None:
            samples = await self._annotate(samples)
        scored = await self._grader.score_group(samples)
        return scored if self._trained_on is None else self._trained_on(scored)

    async def _episode(self, place: int, episode: Episode, running: _Running) -> None:
        if episode.finished:
            running.done[place] = list(episode.finished)
            return
        async with self._slots:
            if running.scope.cut:
                return
            try:
                context = episode.context
                with requests_of(running.scope, context.served, context.episode_id):
                    result = await self._function(self._engine, episode.prompt, episode.context)
            except (GenerationError, ServerError):
                raise
            except Exception as error:  # noqa: BLE001 - the function is the user's: it may raise anything
                result = _lost(episode, repr(error))
        samples = result if isinstance(result, list) else [result]
        running.done[place] = samples or [
            _lost(episode, "the generate function returned no sample")
        ]

    async def _write_shard(self, at_least: int) -> None:
        async with self._write_lock:
            if len(self._unwritten) < at_least:
                return
            groups, self._unwritten = self._unwritten, []
            rows = [sample for group in groups for sample in group]
            # A thread cannot be cancelled: it is waited for where the batch is given up.
            self._append = asyncio.create_task(asyncio.to_thread(self._writer.append, rows))
            await asyncio.shield(self._append)

    def _exhausted(self, target: int) -> str:
        reasons = Counter(outcome.reason for outcome in self.others)
        found = ", ".join(f"{count} {reason}" for reason, count in reasons.most_common())
        return f"{self._members()} of {target} groups are usable ({found})"


CUT: Literal["cut"] = "cut"
SURPLUS: Literal["surplus"] = "surplus"


class GroupsExhaustedError(ValueError):
    """Too few groups pass the filter; the message has the reasons of the others."""


def _numbered(samples: Sequence[Sample]) -> list[Sample]:
    return [replace(sample, index=i) for i, sample in enumerate(samples)]


def _not_begun(episode: Episode) -> Sample:
    """What was begun before stays as it is; else a sample without a token."""
    partial, context = episode.context.partial, episode.context
    if partial is not None:
        return partial
    return context.sample(
        episode.prompt, "", [], [], "", [], status=Status.ABORTED, finish_reason="abort"
    )


def _lost(episode: Episode, error: str) -> Sample:
    context = episode.context
    sample = context.sample(
        episode.prompt, "", [], [], "", [], status=Status.FAILED, finish_reason="error"
    )
    return failed(sample, error)
