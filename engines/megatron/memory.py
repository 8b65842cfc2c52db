"""What a training step takes of its GPU's memory, and what it gives back afterwards.

PyTorch keeps what its tensors no longer need, and to give back and take anew what a step needs
takes 50 ms. Where a server shares the GPU it is given back only if the server needs it.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

GIB = 1 << 30
SPARE_BYTES = 8 << 30
"""More than what a push takes while the server has its memory: a bucket, and copies of weights."""


class Turns:
    """The memory of a GPU by turns: a step's, and a server's that sleeps meanwhile.

    How much the server needs is known once it was seen awake and asleep.
    """

    def __init__(self, *, shares_gpu: bool) -> None:
        self._shares = shares_gpu and torch.cuda.is_available()
        self._awake_bytes: int | None = None
        self._needed_bytes: int | None = None

    @contextmanager
    def step(self) -> Iterator[dict[str, float]]:
        """Gives a dictionary that, after the block, says what the block took, in GiB.

        ``perf/gpu_free_gib``: what was there for the block as it began, with what this process keeps
        unused. ``perf/gpu_peak_gib``: most that this process had in tensors. ``perf/gpu_kept_gib``:
        what its tensors still hold. Empty on a CPU.
        """
        found: dict[str, float] = {}
        if not torch.cuda.is_available():
            yield found
            return
        torch.cuda.reset_peak_memory_stats()
        free_bytes = torch.cuda.mem_get_info()[0] + unused_bytes()
        if self._awake_bytes is not None:
            self._needed_bytes = free_bytes - self._awake_bytes
        yield found
        self._give_back(self._needed_bytes)
        found["perf/gpu_free_gib"] = free_bytes / GIB
        found["perf/gpu_peak_gib"] = torch.cuda.max_memory_allocated() / GIB
        found["perf/gpu_kept_gib"] = torch.cuda.memory_allocated() / GIB

    def pushed(self) -> None:
        """The server is awake and has the step's weights: the buckets are of no use any more."""
        if self._shares:
            self._give_back(None if self._needed_bytes is None else 0)
            self._awake_bytes = torch.cuda.mem_get_info()[0] + unused_bytes()

    def _give_back(self, needed_bytes: int | None) -> None:
        """Leave the server what it needs, and some; all where that is not known."""
        if not self._shares:
            return
        if needed_bytes is None or torch.cuda.mem_get_info()[0] < needed_bytes + SPARE_BYTES:
            torch.cuda.empty_cache()


def unused_bytes() -> int:
    """What PyTorch keeps of the GPU's memory without a tensor in it."""
    return torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
