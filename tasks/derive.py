"""Make a run from another one: what it takes over, checked before anything is written."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from prefect import task
from prefect.cache_policies import NO_CACHE

from rollflow.engines.rollout.datasets import grader_of
from rollflow.engines.rollout.tally import Tally
from rollflow.storage.checkpoints import list_checkpoints
from rollflow.storage.config import StoreConfig
from rollflow.storage.manifests import batch_folder, commit_batch, find_batch, read_batch
from rollflow.storage.objects import Store
from rollflow.storage.origins import (
    batch_home,
    checkpoint_before,
    clear_unborn,
    copy_checkpoint,
    stored_batches,
)
from rollflow.storage.refs import BatchRef, CheckpointRef, RunRef
from rollflow.storage.runs import Origin, open_run, run_ref
from rollflow.storage.samples import Sample, Status
from rollflow.storage.shards import ShardWriter

from .preflight import open_or_create
from .settings import RunSettings

ROWS_PER_PART = 512


@dataclass(frozen=True, slots=True)
class Source:
    """What a run is made from."""

    run: RunRef
    batches: tuple[BatchRef, ...] = ()
    """Those that are trained on, or scored, again."""
    saved_steps: frozenset[int] = frozenset()
    """Steps after which the source saved a checkpoint."""


@task(name="find source", cache_policy=NO_CACHE)
async def find_source(store: StoreConfig, name: str, first: int, end: int | None) -> Source:
    """The batches of steps ``first`` to ``end - 1`` of a run, and where it saved checkpoints.

    Raises:
        ValueError: there is no such run, or a batch is missing.
    """
    opened = Store(store)
    run = open_run(opened, name)
    batches = await asyncio.to_thread(stored_batches, opened, run, first, end)
    saved = frozenset(ref.step for ref in list_checkpoints(opened, run))
    return Source(run, tuple(batches), saved)


@task(name="derive run", cache_policy=NO_CACHE)
async def derive_run(config: RunSettings, origin: Origin) -> RunRef:
    """Create the run that ``origin`` describes, with the checkpoint that its first step goes on from.

    Repeated, it gives the run that stands. A run exists once its record does, which is written last.

    Raises:
        ValueError: the checkpoint is missing, or a run of that name was made otherwise.
    """
    store = Store(config.store)
    run = run_ref(store, config.name)
    if not store.exists(f"{run.url}/run.json"):
        checkpoint = _start(store, origin)
        clear_unborn(store, run)
        if checkpoint:
            await asyncio.to_thread(copy_checkpoint, store, checkpoint, run)
    return open_or_create(config, origin)


def _start(store: Store, origin: Origin) -> CheckpointRef | None:
    if origin.kind in ("rescore", "rollout"):
        return None
    return checkpoint_before(store, open_run(store, origin.run), origin.first_step)


def replay_origin(store: StoreConfig, source: str, first: int) -> Origin:
    """The origin of a run that trains on the batches of ``source`` from step ``first`` on."""
    opened = Store(store)
    home = batch_home(opened, open_run(opened, source))
    return Origin("replay", source, first, batches=home.name)


@dataclass(frozen=True, slots=True)
class Rescored:
    """A batch with new rewards, and what they changed."""

    batch: BatchRef
    changed: int
    """Samples whose reward is another."""


@task(name="rescore batch", task_run_name="rescore step {batch.step}", cache_policy=NO_CACHE)
async def rescore_batch(config: RunSettings, run: RunRef, batch: BatchRef) -> Rescored:
    """Score a batch of another run again; committed in ``run`` under the same step and ids.

    A batch that stands there already is not scored again.
    """
    store = Store(config.store)
    done = await asyncio.to_thread(find_batch, store, run, batch.step)
    if done is not None:
        return Rescored(done, int(done.metrics.get("rollout/rescored_changed", 0)))
    samples = await asyncio.to_thread(read_batch, store, batch)
    groups: dict[str, list[Sample]] = {}
    for sample in samples:
        groups.setdefault(sample.group_id, []).append(_unscored(sample, run.name))
    grader = grader_of(config.rollout, config.rollout.reward, config.rollout.group_reward)
    try:
        await grader.start()
        scored_groups = await asyncio.gather(*map(grader.score_group, groups.values()))
    finally:
        await grader.stop()
    scored = [sample for group in scored_groups for sample in group]
    changed = sum(s.reward != s.previous_reward for s in scored)
    return Rescored(await asyncio.to_thread(_commit, store, run, batch, scored, changed), changed)


def _unscored(sample: Sample, run: str) -> Sample:
    """The sample as it was generated, with the earlier grader's word beside it.

    One that failed only because the earlier grader did ended as its finish reason says.
    """
    status = sample.status
    metadata = sample.metadata
    if status is Status.FAILED and sample.response_ids and sample.grader:
        status = Status.TRUNCATED if sample.finish_reason == "length" else Status.COMPLETED
        metadata = {k: v for k, v in metadata.items() if k != "error"}
    return replace(
        sample,
        run=run,
        status=status,
        metadata=metadata,
        reward=None,
        reward_parts={},
        grader="",
        previous_reward=sample.reward,
        previous_grader=sample.grader,
    )


def _commit(
    store: Store, run: RunRef, source: BatchRef, samples: Sequence[Sample], changed: int
) -> BatchRef:
    tally, groups = Tally(), dict[str, list[Sample]]()
    for sample in samples:
        groups.setdefault(sample.group_id, []).append(sample)
    for group in groups.values():
        tally.add(group)
    writer = ShardWriter(store, run, batch_folder(run, source.step))
    for start in range(0, len(samples), ROWS_PER_PART):
        writer.append(samples[start : start + ROWS_PER_PART])
    ledger: dict[str, Any] = {"rescored": {"url": source.url, "digest": source.digest}}
    return commit_batch(
        store,
        run,
        batch_folder(run, source.step),
        source.step,
        writer.parts,
        groups=len(groups),
        policy_versions=sorted(tally.versions),
        metrics={**tally.metrics("rollout"), "rollout/rescored_changed": float(changed)},
        ledger=ledger,
    )
