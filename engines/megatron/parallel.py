"""Process groups and random states of a trainer rank."""

import datetime
import os
import random
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel

from rollflow.engines.cpu import megatron as cpu_support
from rollflow.engines.cpu.megatron import cuda_means_cpu
from rollflow.engines.meeting import TCPStore

from .attention import Layout
from .gloo import one_device
from .model import Model
from .settings import Settings


def join(store: TCPStore, rank: int, world_size: int, *, backend: str, timeout_s: float) -> None:
    """Make the default process group. Every rank must call it within ``timeout_s`` seconds."""
    on_loopback = store.host.startswith("127.")
    if on_loopback:
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    if "nccl" in backend:
        torch.cuda.set_device(rank % torch.cuda.device_count())
        # As SGLang sets it: trainer and servers must agree on it when weights are broadcast.
        os.environ.setdefault("NCCL_CUMEM_ENABLE", "0")
        if on_loopback:
            os.environ["NCCL_SOCKET_IFNAME"] = "lo"
    timeout = datetime.timedelta(seconds=timeout_s)
    with one_device():
        dist.init_process_group(
            backend, store=store, rank=rank, world_size=world_size, timeout=timeout
        )


def make_groups(settings: Settings, seed: int, *, timeout_s: float) -> None:
    """Divide the ranks into megatron-core's groups and seed every source of random numbers.

    Ranks of one pipeline stage start from the same seed, so random weights agree among them.
    """
    cpu_support.install()
    with cuda_means_cpu(), one_device():
        parallel_state.initialize_model_parallel(
            settings.tensor_parallel,
            settings.pipeline_parallel,
            context_parallel_size=settings.context_parallel,
            expert_model_parallel_size=settings.expert_parallel,
            expert_tensor_parallel_size=settings.expert_tensor_parallel,
            distributed_timeout_minutes=max(1, round(timeout_s / 60)),
        )
        seed += 100 * parallel_state.get_pipeline_model_parallel_rank()
        random.seed(seed)
        np.random.seed(seed % 2**32)
        torch.manual_seed(seed)
        tensor_parallel.model_parallel_cuda_manual_seed(seed)


def row_layout(model: Model) -> Layout:
    """How the ranks share a row of packed tokens."""
    return Layout(
        context_ranks=parallel_state.get_context_parallel_world_size(),
        context_rank=parallel_state.get_context_parallel_rank(),
        multiple=(
            parallel_state.get_tensor_model_parallel_world_size() if model.sequence_parallel else 1
        ),
    )


def background_group() -> Any:
    """A gloo group of all ranks for a thread beside training. Every rank makes it at the same time."""
    if not _background:
        with one_device():
            _background.append(dist.new_group(backend="gloo"))
    return _background[0]


_background: list[Any] = []


def leave() -> None:
    """Take the process groups down; harmless when there are none."""
    _background.clear()
    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()
