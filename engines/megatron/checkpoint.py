"""Checkpoints: megatron-core's torch_dist format, staged on local disk and kept in the store.

A checkpoint holds weights, optimizer, learning-rate schedule and random states, so that training
goes on from it bit by bit; beside it, if wanted, the weights as a Hugging Face folder. Its manifest
is written last.
"""

import queue
import random
import tempfile
import threading
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
from megatron.core.dist_checkpointing.utils import add_prefix_for_sharding
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

from rollflow.engines.cpu.megatron import cuda_means_cpu
from rollflow.engines.published import copy_small_files
from rollflow.storage.checkpoints import (
    StoredFile,
    checkpoint_folder,
    commit_checkpoint,
    fetch_checkpoint,
    prepare_checkpoint,
    store_files,
)
from rollflow.storage.objects import Store
from rollflow.storage.refs import CheckpointRef, RunRef

from . import parallel
from .critic import Critic
from .export import save_hugging_face
from .learner import Learner
from .model import Model
from .model_parts import unwrapped
from .optimizer_state import optimizer_state, restore_optimizer

T = TypeVar("T")

TORCH_DIST = "torch_dist"
HUGGING_FACE = "hf"
ORIGIN = "huggingface"
"""Configuration and tokenizer alone."""


Saving = Future[CheckpointRef]
"""A checkpoint on its way into the store: its result is the committed ref, or the error."""


def save_checkpoint(
    learner: Learner,
    store: Store,
    run: RunRef,
    step: int,
    weights_digest: str,
    *,
    model_path: str,
    hf: bool,
) -> Saving:
    """Save what training after ``step`` goes on from. Every rank calls it; all get the same ref.

    When it returns, everything is copied to this machine's disk and training may go on; checksums,
    the way into the store and the commit run beside it. Configuration and tokenizer of
    ``model_path`` are kept beside the checkpoint, so that it can be converted without anything else;
    with ``hf`` the weights too, as a Hugging Face folder. A checkpoint that is committed already is
    left as it is.
    """
    saving: Saving = Future()
    group = parallel.background_group()
    standing = _from_rank_0(lambda: prepare_checkpoint(store, run, step))
    if standing is not None:
        saving.set_result(standing)
        return saving
    own = tempfile.TemporaryDirectory(prefix="rollflow-checkpoint-")
    # One folder for the ranks of a machine; elsewhere the same path is another folder.
    staging = Path(_from_rank_0(lambda: own.name))
    _stage(learner, staging, model_path, hf)

    def finish() -> None:
        try:
            with own:
                stored = store_files(
                    store, checkpoint_folder(run, step), staging, _own_files(staging)
                )
                everyone: list[list[StoredFile]] = [[] for _ in range(dist.get_world_size())]
                dist.all_gather_object(everyone, stored, group=group)
            files = [file for files in everyone for file in files]
            details = {"world_size": dist.get_world_size(), "hf": hf}
            saving.set_result(
                _from_rank_0(
                    lambda: commit_checkpoint(store, run, step, weights_digest, files, details),
                    group,
                )
            )
        except BaseException as error:  # noqa: BLE001 - whoever asks for the result gets it
            saving.set_exception(error)

    threading.Thread(target=finish, name=f"checkpoint-{step}").start()
    return saving


def _stage(learner: Learner, staging: Path, model_path: str, hf: bool) -> None:
    """Every rank's part as files on its machine's disk."""
    (staging / TORCH_DIST).mkdir(parents=True, exist_ok=True)
    dist.barrier()
    with cuda_means_cpu():
        dist_checkpointing.save(
            _state(learner, is_loading=False),
            str(staging / TORCH_DIST),
            sharded_strategy=_SaveHere("torch_dist", 1, thread_count=1),
        )
    write = dist.get_rank() == 0
    if hf:
        save_hugging_face(learner.model, model_path, staging / HUGGING_FACE, write=write)
    elif write:
        copy_small_files(Path(model_path), staging / ORIGIN)
    # Rank 0's folder may not go before every rank has written into it.
    dist.barrier()


def load_checkpoint(learner: Learner, store: Store, ref: CheckpointRef) -> None:
    """Put weights, optimizer, schedule and random states back as they were saved.

    The saver's ranks may have been laid out in any other way.

    Raises:
        ManifestError: a file is not as it was written.
    """
    with tempfile.TemporaryDirectory(prefix="rollflow-checkpoint-") as staging:
        folder = fetch_checkpoint(store, ref, Path(staging))
        with cuda_means_cpu():
            source = str(folder / TORCH_DIST)
            wanted = _state(learner, is_loading=True)
            if dist_checkpointing.load_common_state_dict(source)["layout"] != _layout():
                # Random states belong to ranks that do not exist here; nothing draws from them.
                del wanted["random"]
            state: Any = dist_checkpointing.load(wanted, source)
            _restore(learner.model, learner, state)
            if learner.critic is not None:
                _restore(learner.critic.model, learner.critic, state["critic"])
    if "random" in state:
        _set_random_states(state["random"])


def _state(learner: Learner, *, is_loading: bool) -> dict[str, Any]:
    state = {
        **_trained_state(learner.model, learner, is_loading),
        "layout": _layout(),
        "random": _random_states(),
    }
    if learner.critic is not None:
        critic = _trained_state(learner.critic.model, learner.critic, is_loading)
        add_prefix_for_sharding(critic, "critic.")
        state["critic"] = critic
    return state


def _trained_state(model: Model, trained: Learner | Critic, is_loading: bool) -> dict[str, Any]:
    """A model with its optimizer and schedule."""
    weights = {key: chunk.sharded_state_dict() for key, chunk in _chunks(model)}
    return {
        **weights,
        "optimizer": optimizer_state(trained.optimizer, weights, is_loading=is_loading),
        "scheduler": trained.scheduler.state_dict(),
    }


def _restore(model: Model, trained: Learner | Critic, state: dict[str, Any]) -> None:
    for key, chunk in _chunks(model):
        chunk.load_state_dict(state[key])
    restore_optimizer(trained.optimizer, state["optimizer"])
    trained.scheduler.load_state_dict(state["scheduler"])


def _layout() -> tuple[int, int]:
    """Pipeline and tensor parallel sizes, by which random states are kept."""
    return (
        parallel_state.get_pipeline_model_parallel_world_size(),
        parallel_state.get_tensor_model_parallel_world_size(),
    )


def _chunks(model: Model) -> list[tuple[str, Any]]:
    """megatron-core's names of the pipeline stages: ``model``, or ``model0``, ``model1``..."""
    chunks = [unwrapped(chunk) for chunk in model.chunks]
    if len(chunks) == 1:
        return [("model", chunks[0])]
    return [(f"model{i}", chunk) for i, chunk in enumerate(chunks)]


def _random_states() -> ShardedObject:
    """One set of states for each model parallel rank; data parallel ranks share theirs."""
    states = {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
        "megatron": _tracker().get_states(),
    }
    place = (
        parallel_state.get_pipeline_model_parallel_rank(),
        parallel_state.get_tensor_model_parallel_rank(),
    )
    replica = parallel_state.get_data_parallel_rank(with_context_parallel=True)
    return ShardedObject("random", states, _layout(), place, replica_id=replica)


def _set_random_states(states: dict[str, Any]) -> None:
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])
    torch.set_rng_state(states["torch"])
    if states["cuda"] is not None:
        torch.cuda.set_rng_state(states["cuda"])
    _tracker().set_states(states["megatron"])


def _tracker() -> Any:
    return get_cuda_rng_tracker()


def _own_files(staging: Path) -> list[str]:
    """What this rank has to store: its shards, and on rank 0 all that belongs to no rank."""
    rank = dist.get_rank()
    files = [f for f in sorted(staging.rglob("*")) if f.is_file()]
    return [
        str(f.relative_to(staging))
        for f in files
        if f.name.startswith(f"__{rank}_") or (rank == 0 and not f.name.startswith("__"))
    ]


def _from_rank_0(make: Callable[[], T], group: Any = None) -> T:
    """What ``make`` gives on rank 0, on every rank; its error is every rank's error."""
    answer: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            answer[0] = make()
        except (OSError, ValueError) as error:
            answer[1] = error
    dist.broadcast_object_list(answer, src=0, group=group)
    if answer[1] is not None:
        raise answer[1]
    return answer[0]


class _SaveHere(TorchDistSaveShardedStrategy):
    """Writes shards in this process.

    megatron-core's own strategy forks writers and starts a manager process, even to save
    synchronously: seconds for a small model, and a process that outlives a killed rank.
    """

    def async_save(self, sharded_state_dict: Any, checkpoint_dir: Any) -> Any:
        filesystem_async._results_queue = queue.Queue()
        request = super().async_save(sharded_state_dict, checkpoint_dir)
        if request.async_fn is None:
            return request
        bound: Any = request.async_fn
        return request._replace(async_fn=partial(_write_buckets, bound.args[0]))


def _write_buckets(
    transforms: list[Any], rank: int, buckets: list[Any], results: "queue.Queue[Any]"
) -> None:
    # In one process plain queues do what multiprocessing's would.
    written: Any = queue.Queue()
    pending: Any = queue.Queue()
    by_bucket: dict[int, Any] = {}
    for number, bucket in enumerate(buckets):
        pending.put(number)
        filesystem_async.FileSystemWriterAsync.write_preloaded_data(
            transforms, number, bucket, written, pending, use_fsync=True
        )
        _, outcome = written.get_nowait()
        if isinstance(outcome, Exception):
            raise outcome
        by_bucket[number] = outcome
    results.put(by_bucket)
