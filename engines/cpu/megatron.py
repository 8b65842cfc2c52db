"""What megatron-core needs to run on a machine without CUDA.

megatron-core names the GPU in a few places where any device would do: it asks for the current CUDA
device, makes scratch tensors with ``device="cuda"``, checks tensor types by their CUDA names and
keeps a random state per CUDA device. Two things answer it here:

* :func:`install`, once per process: checks the version and puts a random-state tracker over
  PyTorch's CPU generator where megatron-core keeps its own;
* :func:`cuda_means_cpu`, around each call into megatron-core: as long as it is entered, "cuda"
  means the CPU. Outside it PyTorch behaves as always. It may be entered again inside itself.

On a machine with CUDA both do nothing.
"""

import contextlib
import importlib.metadata
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

TESTED = "0.16.1"


def install() -> None:
    """Prepare megatron-core for the CPU in this process; again is harmless.

    Raises:
        RuntimeError: megatron-core has a version that this support was not tested with.
    """
    if torch.cuda.is_available():
        return
    version = importlib.metadata.version("megatron-core")
    if version != TESTED:
        raise RuntimeError(
            f"megatron-core {version} on a CPU: the support in {__name__} was tested with "
            f"{TESTED}; install that one"
        )
    from megatron.core.tensor_parallel import random

    if not isinstance(random._CUDA_RNG_STATE_TRACKER, CpuRngTracker):
        random._CUDA_RNG_STATE_TRACKER = CpuRngTracker()
        random._CUDA_RNG_STATE_TRACKER_INITIALIZED = True


@contextlib.contextmanager
def cuda_means_cpu() -> Iterator[None]:
    """While entered, megatron-core's requests for a CUDA device are answered by the CPU."""
    if torch.cuda.is_available():
        yield
        return
    current_device, synchronize = torch.cuda.current_device, torch.cuda.synchronize
    torch.cuda.current_device = _cpu_device
    torch.cuda.synchronize = _no_wait
    try:
        with _CudaMeansCpu():
            yield
    finally:
        torch.cuda.current_device = current_device
        torch.cuda.synchronize = synchronize


class CpuRngTracker:
    """Named random states over PyTorch's CPU generator; the verbs of megatron-core's tracker."""

    use_cudagraphable_rng = False
    is_inference_rng_tracker = False

    def __init__(self) -> None:
        self.reset()

    def is_initialized(self) -> bool:
        return bool(self._states)

    def reset(self) -> None:
        self._states: dict[str, torch.Tensor] = {}
        self._seeds: set[int] = set()

    def get_states(self) -> dict[str, torch.Tensor]:
        return dict(self._states)

    def set_states(self, states: dict[str, torch.Tensor]) -> None:
        self._states = dict(states)

    def add(self, name: str, seed: int) -> None:
        """Start the random state ``name`` from ``seed``; neither may be in use."""
        if name in self._states or seed in self._seeds:
            raise ValueError(f"random state {name!r} or its seed {seed} exists already")
        self._seeds.add(seed)
        self._states[name] = torch.Generator("cpu").manual_seed(seed).get_state()

    @contextlib.contextmanager
    def fork(self, name: str = "model-parallel-rng") -> Iterator[None]:
        """Draw from the state ``name`` inside the block and from the previous one after it."""
        outside = torch.get_rng_state()
        torch.set_rng_state(self._states[name])
        try:
            yield
        finally:
            self._states[name] = torch.get_rng_state()
            torch.set_rng_state(outside)


class _CudaMeansCpu(TorchFunctionMode):
    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if kwargs:
            kwargs = dict(kwargs)
            device = kwargs.get("device")
            if device is not None and torch.device(device).type == "cuda":
                kwargs["device"] = "cpu"
            if kwargs.get("pin_memory"):
                kwargs["pin_memory"] = False
        if func is torch.Tensor.cuda:
            return args[0]
        answer = func(*args, **(kwargs or {}))
        if func is torch.Tensor.type and isinstance(answer, str):
            # megatron-core tells precisions apart by the CUDA names of tensor types.
            return "torch.cuda." + answer.removeprefix("torch.").removeprefix("cuda.")
        return answer


def _cpu_device() -> torch.device:
    return torch.device("cpu")


def _no_wait(device: Any = None) -> None:
    return None
