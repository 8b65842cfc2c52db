"""One training step's batch: which groups it is given, how it is filled, and what is put back."""

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace

from rollflow.engines.hooks import load_hook
from rollflow.storage.buffer import PRIORITIES, BufferState, DataBuffer, Draw, Kept
from rollflow.storage.ledger import Issue, IssuedGroup, durable_groups, issue, read_issue
from rollflow.storage.manifests import (
    LeftOut,
    batch_folder,
    commit_batch,
    find_batch,
    read_left_out,
)
from rollflow.storage.objects import Store
from rollflow.storage.refs import BatchRef, RunRef
from rollflow.storage.samples import Sample, Status
from rollflow.storage.shards import ShardWriter

from .client import GenerateClient
from .collector import CUT, SURPLUS, Annotate, Collector, Episode, GroupsExhaustedError, Outcome
from .config import HooksConfig, RolloutConfig
from .datasets import Asked, Dataset, by_episode
from .filters import DynamicFilter
from .trained_on import TrainedOn


@dataclass(frozen=True, slots=True)
class Production:
    """What every step of a run is produced with."""

    run: RunRef
    store: Store
    rollout: RolloutConfig
    dataset: Dataset
    buffer: DataBuffer
    client: GenerateClient | None
    slots: asyncio.Semaphore
    engine: str
    dynamic_filter: DynamicFilter | None = None
    trained_on: TrainedOn | None = None
    annotate: Annotate | None = None


class Producer:
    """Produces one step. :meth:`fill`, then :meth:`commit`."""

    def __init__(self, production: Production, step: int, policy_version: int) -> None:
        self._p = production
        self._asked = Asked(production.run, step, policy_version, production.engine)
        self._waves = 0
        self._standing: list[IssuedGroup] = []
        self.collector: Collector
        self.issued = 0

    @property
    def step(self) -> int:
        return self._asked.step

    async def fill(self) -> None:
        """Generate and score the step's groups; those that an earlier attempt finished are taken.

        ValueError where too few groups pass the filter, or the data have changed under the run.
        """
        p, step = self._p, self.step
        folder = batch_folder(p.run, step)
        self.collector = Collector(
            p.dataset.engine,
            p.dataset.generate,
            p.dataset.grader,
            await asyncio.to_thread(ShardWriter, p.store, p.run, folder),
            p.slots,
            p.rollout.shard_groups,
            client=p.client,
            dynamic_filter=p.dynamic_filter,
            trained_on=p.trained_on,
            annotate=p.annotate,
        )
        begun = await asyncio.to_thread(self._resumed)
        for group in begun:
            if _is_finished(group):
                await self.collector.adopt([s for e in group for s in e.finished])
        rest = [group for group in begun if not _is_finished(group)]
        try:
            await self.collector.fill(
                p.rollout.batch_size, self._new_wave, early=p.rollout.early_stop, first=rest
            )
        except GroupsExhaustedError as error:
            raise ValueError(
                f"step {step}: {error} after rollout.max_waves = {p.rollout.max_waves} times "
                f"{p.rollout.wave} groups; loosen hooks.dynamic_filter, raise rollout.max_waves or "
                "give prompts that the policy solves sometimes"
            ) from error

    async def commit(self, metrics: dict[str, float]) -> BatchRef:
        """Write the last part and the manifest, with the buffer as it is then: commit point A."""
        p, collector = self._p, self.collector
        parts = await collector.write()
        metrics = {**metrics, **collector.timings}  # with the seconds that this took
        others = collector.others
        p.buffer.put_back([k for k in map(self._kept, others) if k is not None])
        left_out = {
            o.group_id: LeftOut(o.reason, len(o.samples)) for o in others if _stands_in_parts(o)
        }
        tally = collector.tally
        state = p.buffer.state()
        return await asyncio.to_thread(
            commit_batch,
            p.store,
            p.run,
            batch_folder(p.run, self.step),
            self.step,
            parts,
            groups=tally.groups,
            policy_versions=sorted(tally.versions),
            metrics=metrics,
            ledger={
                "prompt_epoch": min(p.buffer.epochs().values()),
                "max_staleness": p.rollout.staleness,
                "buffer": state.to_json(),
            },
            left_out=left_out,
        )

    def metrics(self) -> dict[str, float]:
        """What the step's sampling control did, by slash name."""
        collector = self.collector
        found: dict[str, float] = {}
        if collector.others or self._p.rollout.wave > self._p.rollout.batch_size:
            reasons = [outcome.reason for outcome in collector.others]
            filtered = [r for r in reasons if r not in (CUT, SURPLUS)]
            found = {
                "rollout/groups_begun": float(self.issued),
                "rollout/groups_cut": float(reasons.count(CUT)),
                "rollout/groups_surplus": float(reasons.count(SURPLUS)),
                "rollout/groups_filtered": float(len(filtered)),
            }
            for reason in sorted(set(filtered)):
                found[f"rollout/filtered/{reason.replace(' ', '_')}"] = float(reasons.count(reason))
        # Sums and minima of each sample: a batch has too many tokens to go through one by one here.
        tokens = [
            s.policy_versions for o in collector.members for s in o.samples if s.policy_versions
        ]
        if tokens and (oldest := min(map(min, tokens))) < self.step:
            count = sum(map(len, tokens))
            found["rollout/staleness_max"] = float(self.step - oldest)
            found["rollout/staleness_mean"] = (self.step * count - sum(map(sum, tokens))) / count
        if waiting := len(self._p.buffer.state().kept):
            found["rollout/buffer_groups"] = float(waiting)
        return found

    async def _new_wave(self) -> list[list[Episode]]:
        p = self._p
        if self._waves >= p.rollout.max_waves:
            return []
        oldest = self.step - p.rollout.staleness
        draws = p.buffer.draw(p.rollout.wave, self.step, oldest)
        return await asyncio.to_thread(self._issue, draws, p.buffer.state().cursors)

    def _issue(self, draws: Sequence[Draw], cursors: dict[str, int]) -> list[list[Episode]]:
        """Write down what is generated before it is."""
        p = self._p
        taken = [group.prompt_id for group in self._standing]
        groups = p.dataset.plan([draw.prompt for draw in draws], self.step, taken)
        begun = [self._begun(draw.continues) for draw in draws]
        groups = [
            _as_begun(group, draw, samples)
            for group, draw, samples in zip(groups, draws, begun, strict=True)
        ]
        issue(
            p.store,
            p.run,
            self.step,
            groups,
            self._asked.policy_version,
            wave=self._waves,
            cursors=cursors,
        )
        self._waves += 1
        self._standing += groups
        self.issued += len(groups)
        return [
            p.dataset.episodes(group, draw.prompt, self._asked, by_episode(samples))
            for group, draw, samples in zip(groups, draws, begun, strict=True)
        ]

    def _resumed(self) -> list[list[Episode]]:
        """The groups that an earlier attempt was given, with what it left of each."""
        p = self._p
        try:
            standing = read_issue(p.store, p.run, self.step)
        except FileNotFoundError:
            return []
        self._check_seeds(standing)
        self._waves = standing.waves
        self._standing = list(standing.groups)
        self.issued = len(standing.groups)
        durable = durable_groups(p.store, p.run, self.step)
        for damage in durable.skipped:
            logging.getLogger("rollflow").warning("not taken, generated again: %s", damage)
        found: dict[str, list[Sample]] = dict(durable.cut)
        for sample in durable.samples:
            found.setdefault(sample.group_id, []).append(sample)
        groups: list[list[Episode]] = []
        for group in standing.groups:
            samples = found.get(group.group_id, [])
            # A group that failed as a whole is worth another try; anything else stays as it is.
            if samples and all(s.status is Status.FAILED for s in samples):
                samples = []
            if not samples and group.continues:
                samples = self._samples_of(group.continues)
            prompt = p.buffer.prompt(group.prompt_id)
            groups.append(p.dataset.episodes(group, prompt, self._asked, by_episode(samples)))
        return groups

    def _check_seeds(self, standing: Issue) -> None:
        prompts = [self._p.buffer.prompt(group.prompt_id) for group in standing.groups]
        plan = self._p.dataset.plan(prompts, self.step)
        for group, planned in zip(standing.groups, plan, strict=True):
            if not group.continues and group != planned:
                raise ValueError(
                    f"step {self.step} was issued with other prompts or seeds than its settings give "
                    f"now, first group {group.group_id}; have the data changed since the run began?"
                )

    def _begun(self, kept: Kept | None) -> list[Sample]:
        return [] if kept is None else self._samples_of(kept.group_id)

    def _samples_of(self, group_id: str) -> list[Sample]:
        """The samples of a group that was put back, from the parts of the step that began it."""
        step = int(group_id.partition("/")[0])
        batch = find_batch(self._p.store, self._p.run, step)
        samples = read_left_out(self._p.store, batch) if batch else []
        found = [s for s in samples if s.group_id == group_id]
        if not found:
            raise ValueError(f"group {group_id} is to be continued but is not in the log")
        return found

    def _kept(self, outcome: Outcome) -> Kept | None:
        """What waits in the buffer of a group that is no member; None where it is done with."""
        if outcome.reason not in (CUT, SURPLUS):
            return None
        sample = outcome.samples[0]
        versions = [v for s in outcome.samples for v in s.policy_versions]
        goes_on = bool(versions) and (self._p.rollout.partial or outcome.reason == SURPLUS)
        return Kept(
            outcome.group_id,
            self.step,
            sample.prompt_id,
            min(versions) if goes_on else None,
            outcome.reason,
        )


def make_buffer(
    dataset: Dataset, rollout: RolloutConfig, hooks: HooksConfig, state: BufferState
) -> DataBuffer:
    """The data buffer of a run, as its log left it; ValueError names a bad hook or setting."""
    priority = rollout.buffer.priority
    if priority not in PRIORITIES and ":" not in priority:
        raise ValueError(
            f"rollout.buffer.priority = {priority!r}; give {', '.join(PRIORITIES)} or pkg.mod:fn"
        )
    return DataBuffer(
        dataset.sources,
        batch_size=rollout.batch_size,
        priority=PRIORITIES.get(priority) or load_hook(priority, "priority"),
        may_draw=load_hook(hooks.buffer_filter, "buffer_filter") if hooks.buffer_filter else None,
        curriculum=load_hook(hooks.curriculum, "curriculum") if hooks.curriculum else None,
        state=state,
    )


def _as_begun(group: IssuedGroup, draw: Draw, samples: Sequence[Sample]) -> IssuedGroup:
    """A group that goes on has the seeds that it was begun with."""
    if draw.continues is None:
        return group
    seeds = {index: found[0].seed for index, found in by_episode(samples).items()}
    return replace(
        group,
        samples=len(seeds),
        seeds=tuple(seeds[i] for i in sorted(seeds)),
        continues=draw.continues.group_id,
    )


def _is_finished(group: Sequence[Episode]) -> bool:
    """Generated and scored, or failed: nothing is left to do."""
    samples = [s for episode in group for s in episode.finished]
    return all(episode.finished for episode in group) and all(
        s.reward is not None or s.status is Status.FAILED for s in samples
    )


def _stands_in_parts(outcome: Outcome) -> bool:
    return any(s.response_ids or s.status is not Status.ABORTED for s in outcome.samples)
