"""One device of gloo for all process groups of a process.

Left to itself every group gets a device of its own, and each device a thread that wakes up a
hundred times a second: with megatron-core's twenty groups a rank spends more on that than on
waiting for others.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import cache
from typing import Any

from torch.distributed import distributed_c10d

Gloo: Any = distributed_c10d.ProcessGroupGloo


@contextmanager
def one_device() -> Iterator[None]:
    """Groups of gloo that are made within share the process's device."""
    distributed_c10d.ProcessGroupGloo = _OnTheDevice
    try:
        yield
    finally:
        distributed_c10d.ProcessGroupGloo = Gloo


@cache
def _device() -> Any:
    return Gloo.create_default_device()


class _OnTheDevice(Gloo):
    def __init__(self, store: Any, rank: int, size: int, timeout: timedelta) -> None:
        options = Gloo._Options()
        options._devices = [_device()]
        options._timeout = timeout
        super().__init__(store, rank, size, options)
