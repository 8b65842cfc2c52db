"""The one place that knows a CPU with gloo from a GPU with NCCL.

Everything else asks :func:`detect` once and passes the answer on.
"""

import ctypes
import importlib.util
import os
from dataclasses import dataclass
from typing import Literal

Device = Literal["cpu", "cuda"]
SHARE = 0.5
"""Of a GPU that a trainer rank and a server share, for Ray's accounts; it divides no memory."""


@dataclass(frozen=True, slots=True)
class Platform:
    """Where the engines compute, e.g. ``Platform("cpu", "gloo")``."""

    device: Device
    backend: Literal["gloo", "cpu:gloo,cuda:nccl"]
    """torch.distributed backend of the trainer's ranks; it follows where a tensor is."""
    gpus: int = 0
    """GPUs that torch sees on this machine."""

    @property
    def own_backend(self) -> Literal["gloo", "nccl"]:
        """That of a process group all of whose tensors are where the engines compute."""
        return "nccl" if self.device == "cuda" else "gloo"

    def gpus_per_engine(self, *, shared: bool) -> float:
        """GPUs that Ray reserves for one trainer rank or one single-GPU server.

        ``shared``: a rank and a server have one GPU together.
        """
        if self.device == "cpu":
            return 0
        return SHARE if shared else 1

    def import_megatron(self) -> None:
        """Import megatron-core and mbridge, on a CPU without what it never calls. Call it before any
        module of ours that imports them."""
        if self.device == "cpu":
            from rollflow.engines.cpu.light_imports import import_megatron

            import_megatron()


def detect(device: Literal["auto", "cpu", "cuda"] = "auto") -> Platform:
    """Find the platform; ``auto`` takes the GPU when torch sees one.

    Raises:
        ValueError: ``cuda`` was asked for and torch sees none.
    """
    if device == "cpu" or (device == "auto" and not has_cuda()):
        return Platform("cpu", "gloo")
    if not has_cuda():
        raise ValueError(
            "cluster.device is 'cuda' but torch sees no CUDA device on this machine; "
            "set cluster.device to 'auto' or 'cpu', or check the driver with nvidia-smi"
        )
    import torch

    return Platform("cuda", "cpu:gloo,cuda:nccl", torch.cuda.device_count())


def one_thread_env() -> dict[str, str]:
    """Environment of an engine process on a CPU: one compute thread.

    Without it every process starts a thread per core and they fight; SGLang becomes erratic.
    """
    threads = os.environ.get("OMP_NUM_THREADS", "1")
    return {
        "OMP_NUM_THREADS": threads,
        "MKL_NUM_THREADS": threads,
        "TOKENIZERS_PARALLELISM": "false",
    }


def has_cuda() -> bool:
    """Whether torch sees a GPU."""
    if importlib.util.find_spec("torch") is None:
        return False
    try:
        ctypes.CDLL("libcuda.so.1")  # the driver: where there is none, torch need not be asked
    except OSError:
        return False
    import torch

    return torch.cuda.is_available()
