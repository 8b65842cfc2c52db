"""Commit point A: a step's batch becomes part of the log."""

import asyncio

from rollflow.engines import cluster
from rollflow.storage.config import StoreConfig
from rollflow.storage.manifests import find_batch as find_stored
from rollflow.storage.objects import Store
from rollflow.storage.refs import BatchRef, GroupsRef, RunRef

from .engines import Engines
from .grain import step_task


@step_task("find batch")
async def find_batch(store: StoreConfig, run: RunRef, step: int) -> BatchRef | None:
    """The batch committed for this step, if there is one: then nothing is generated again."""
    return find_stored(Store(store), run, step)


@step_task("write batch")
async def write_batch(engines: Engines, groups: GroupsRef) -> BatchRef:
    """Write the last shard, then the manifest. Servers that share the trainer's GPU fall asleep
    meanwhile: nothing is asked of them before new weights are."""
    verbs = [("write", groups), *([("sleep",)] if engines.take_turns else [])]
    calls = [cluster.call(engines.manager, *verb, timeout_s=engines.timeout_s) for verb in verbs]
    [batch], *_ = await asyncio.gather(*calls)
    return batch
