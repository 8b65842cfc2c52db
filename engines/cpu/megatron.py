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
    from megatron.core.transformer.moe import token_dispatcher

    if not isinstance(random._CUDA_RNG_STATE_TRACKER, CpuRngTracker):
        random._CUDA_RNG_STATE_TRACKER = CpuRngTracker()
        random._CUDA_RNG_STATE_TRACKER_INITIALIZED = True
        # Recomputed activations draw the same random numbers again.
        random._get_cuda_rng_state = lambda *_, **__: torch.get_rng_state()
        random._set_cuda_rng_state = lambda state, *_, **__: torch.set_rng_state(state)
        token_dispatcher.maybe_move_tensor_to_cpu = _as_on_a_cpu


@contextlib.contextmanager
def cuda_means_cpu() -> Iterator[None]:
    """While entered, megatron-core's requests for a CUDA device are answered by the CPU."""
    if torch.cuda.is_available():
        yield
        return
    before = {name: getattr(torch.cuda, name) for name in _INSTEAD}
    try:
        for name, instead in _INSTEAD.items():
            setattr(torch.cuda, name, instead)
        with _CudaMeansCpu():
            yield
    finally:
        for name, original in before.items():
            setattr(torch.cuda, name, original)


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


class _Stream:
    """The only order in which a CPU computes: nothing runs beside anything, nothing is waited for."""

    def wait_stream(self, stream: Any) -> None:
        return None

    def record_event(self) -> Any:
        return self

    def synchronize(self) -> None:
        return None


_THE_STREAM = _Stream()


def _as_on_a_cpu(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
    """Token counts that megatron-core brings from the GPU: collectives take numpy's, not tensors."""
    return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor


def _no_wait(device: Any = None) -> None:
    return None


_INSTEAD: dict[str, Callable[..., Any]] = {
    "current_device": lambda: torch.device("cpu"),
    "synchronize": _no_wait,
    "Stream": lambda *_, **__: _THE_STREAM,
    "current_stream": lambda device=None: _THE_STREAM,
    "stream": lambda stream: contextlib.nullcontext(),
}
"""Functions of ``torch.cuda`` that megatron-core calls wherever it runs."""
