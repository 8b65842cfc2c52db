"""Save weights and optimizer; find the weights of a checkpoint."""

import asyncio
from dataclasses import dataclass
from pathlib import Path

from prefect import task
from prefect.cache_policies import NO_CACHE

from rollflow.engines import cluster
from rollflow.engines.megatron.config import CheckpointConfig
from rollflow.storage.checkpoints import delete_checkpoint, fetch_checkpoint, list_checkpoints
from rollflow.storage.config import StoreConfig
from rollflow.storage.objects import Store
from rollflow.storage.refs import RunRef

from .engines import Engines


@task(name="save checkpoint", cache_policy=NO_CACHE)
async def save_checkpoint(
    engines: Engines,
    config: CheckpointConfig,
    store: StoreConfig,
    run: RunRef,
    step: int,
    *,
    last: bool,
) -> None:
    """Write torch_dist shards, Hugging Face weights where asked for, and last the manifest.

    With ``config.background`` only the last is waited for. Checkpoints that are not to stay any
    longer are deleted then.
    """
    wait = last or not config.background
    await cluster.call(engines.ranks, "save", step, config.hf, wait, timeout_s=engines.timeout_s)
    await asyncio.to_thread(delete_expired, Store(store), config, run)


def delete_expired(store: Store, config: CheckpointConfig, run: RunRef) -> list[int]:
    """Delete what ``keep_last`` and ``keep_every`` do not keep; the steps whose checkpoints went."""
    standing = {ref.step: ref for ref in list_checkpoints(store, run)}
    expired = config.expired(list(standing))
    for step in expired:
        delete_checkpoint(store, standing[step])
    return expired


@dataclass(frozen=True, slots=True)
class Weights:
    """Hugging Face weights on this machine."""

    step: int
    path: str


async def checkpoint_weights(store: StoreConfig, run: RunRef, step: int | None) -> Weights | None:
    """The Hugging Face folder of a checkpoint, the newest unless ``step`` is given.

    A checkpoint in an object store is brought to ``.rollflow/cache``, every byte verified.

    Returns:
        None where the run has no checkpoint yet.

    Raises:
        ValueError: there is no checkpoint of that step, or it was saved without ``checkpoint.hf``.
    """
    remote = Store(store)
    known = {c.step: c for c in list_checkpoints(remote, run)}
    if step is None and not known:
        return None
    ref = known.get(max(known)) if step is None else known.get(step)
    if ref is None:
        raise ValueError(
            f"run {run.name!r} has no checkpoint of step {step}; it has {sorted(known)}"
        )
    staging = Path(".rollflow/cache").resolve() / run.name / f"step-{ref.step:06d}"
    folder = await asyncio.to_thread(fetch_checkpoint, remote, ref, staging)
    if not (folder / "hf").is_dir():
        raise ValueError(
            f"checkpoint of step {ref.step} of run {run.name!r} has no Hugging Face weights; "
            "set checkpoint.hf = true in the run that saves it"
        )
    return Weights(ref.step, str(folder / "hf"))
