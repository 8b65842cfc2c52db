"""What a training step takes of its GPU's memory, and what it gives back afterwards."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

GIB = 1 << 30


@contextmanager
def watched(*, shares_gpu: bool) -> Iterator[dict[str, float]]:
    """Gives a dictionary that, after the block, says what the block took, in GiB.

    ``perf/gpu_free_gib``: free on the GPU as the block began, for whichever process asks.
    ``perf/gpu_peak_gib``: most that this process had in tensors. ``perf/gpu_kept_gib``: what it
    still holds. With ``shares_gpu`` nothing is held but living tensors: the rest is a server's.
    Empty on a CPU.
    """
    found: dict[str, float] = {}
    if not torch.cuda.is_available():
        yield found
        return
    torch.cuda.reset_peak_memory_stats()
    free_bytes = torch.cuda.mem_get_info()[0]
    yield found
    if shares_gpu:
        torch.cuda.empty_cache()
    found["perf/gpu_free_gib"] = free_bytes / GIB
    found["perf/gpu_peak_gib"] = torch.cuda.max_memory_allocated() / GIB
    found["perf/gpu_kept_gib"] = torch.cuda.memory_reserved() / GIB
