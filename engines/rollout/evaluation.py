"""One evaluation of the weights: answers that are scored, or the loss of the labels."""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from rollflow.storage.manifests import batch_folder, commit_batch
from rollflow.storage.objects import Store
from rollflow.storage.refs import BatchRef
from rollflow.storage.samples import Sample
from rollflow.storage.shards import Part, ShardWriter

from .client import GenerateClient
from .collector import Collector, Episode
from .config import EvalConfig
from .datasets import Asked, Dataset
from .tally import Tally, pass_metrics

LossFn = Callable[[list[Sample]], Awaitable[dict[str, float]]]
"""The trainer's metrics of labelled samples, by plain names."""


@dataclass(frozen=True, slots=True)
class Evaluation:
    """A dataset, and the weights that it is to measure."""

    store: Store
    config: EvalConfig
    dataset: Dataset
    asked: Asked

    async def by_answers(
        self, client: GenerateClient | None, slots: asyncio.Semaphore, shard_groups: int
    ) -> tuple[BatchRef, list[Sample]]:
        """Answer and score every prompt."""
        collector = Collector(
            self.dataset.engine,
            self.dataset.generate,
            self.dataset.grader,
            await self._writer(),
            slots,
            shard_groups,
            client=client,
        )
        await collector.generate(self._episodes())
        parts = await collector.write()
        groups = [outcome.samples for outcome in collector.members]
        rewards = [[s.reward for s in samples] for samples in groups]
        prefix, solved_at = f"eval/{self.config.name}", self.config.solved_at
        metrics = {
            **collector.tally.metrics(prefix),
            **pass_metrics(prefix, rewards, solved_at),
        }
        samples = [sample for group in groups for sample in group]
        return await self._commit(parts, collector.tally, metrics), samples

    async def by_loss(self, loss_of: LossFn) -> tuple[BatchRef, list[Sample]]:
        """Measure what every label costs the trainer's weights; nothing is generated or scored.

        ValueError names a prompt without a label.
        """
        tally, samples = Tally(), list[Sample]()
        for group in self._episodes():
            for episode in group:
                made = await self.dataset.generate(
                    self.dataset.engine, episode.prompt, episode.context
                )
                samples += made if isinstance(made, list) else [made]
                tally.add(samples[-1:])
        losses = await loss_of(samples)
        writer = await self._writer()
        await asyncio.to_thread(writer.append, samples)
        metrics = {f"eval/{self.config.name}/{name}": x for name, x in losses.items()}
        return await self._commit(writer.parts, tally, metrics), samples

    def _episodes(self) -> list[list[Episode]]:
        prompts = self.dataset.prompts
        plan = self.dataset.plan(prompts, self.asked.step)
        return [self.dataset.episodes(g, p, self.asked) for g, p in zip(plan, prompts, strict=True)]

    @property
    def _folder(self) -> str:
        return batch_folder(self.asked.run, self.asked.step, self.config.name)

    async def _writer(self) -> ShardWriter:
        return await asyncio.to_thread(ShardWriter, self.store, self.asked.run, self._folder)

    async def _commit(
        self, parts: tuple[Part, ...], tally: Tally, metrics: dict[str, float]
    ) -> BatchRef:
        return await asyncio.to_thread(
            commit_batch,
            self.store,
            self.asked.run,
            self._folder,
            self.asked.step,
            parts,
            groups=tally.groups,
            policy_versions=sorted(tally.versions),
            metrics=metrics,
            ledger={},
            dataset=self.config.name,
        )
