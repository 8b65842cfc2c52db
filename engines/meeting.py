"""Where processes meet: a store on loopback, and process groups that no other group knows of."""

import contextlib
import datetime
import functools
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d

T = TypeVar("T")
TCPStore = dist.TCPStore  # pyright: ignore[reportPrivateImportUsage]
Backend = Literal["gloo", "nccl"]

LOOPBACK = "127.0.0.1"
TICK_S = 0.0001
"""Seconds between two looks at what is awaited."""
CHANNEL = "rollflow-"
"""What the names of process groups for weights begin with; servers leave others to SGLang."""
TIMEOUT, OVER, LAST = "timeout_s", "over", "last"
"""Keys in the store of such a group: for how many seconds a server may wait for anything; why all is
over. What stands there for a bucket behind the last."""
WATCHDOG_S = 60.0
"""Seconds after our own deadline at which PyTorch gives an operation on a GPU up."""
FATAL_ERRORS = "TORCH_NCCL_ASYNC_ERROR_HANDLING"
"""Environment variable: whether PyTorch ends the process when an operation fails. A process group has
it as it is when the group is made."""


def open_store(host: str) -> TCPStore:
    """A meeting point on a free port of ``host`` alone, taken from here on.

    Left to itself the store would listen on every interface.
    """
    listener = socket.create_server((host, 0))
    port = listener.getsockname()[1]
    descriptor = listener.detach()  # the store's from here on
    return TCPStore(host, port, is_master=True, wait_for_workers=False, master_listen_fd=descriptor)


def connect_store(master: str, timeout_s: float) -> TCPStore:
    """A client of the meeting point ``host:port``."""
    host, _, port = master.rpartition(":")
    timeout = datetime.timedelta(seconds=timeout_s)
    return TCPStore(host, int(port), is_master=False, timeout=timeout)


def bucket_key(push: int, number: int) -> str:
    """In the store of a group for weights: what a bucket of a push holds."""
    return f"{push}/{number}"


def ready_key(push: int, rank: int) -> str:
    """Set by a server that waits for the first bucket of a push."""
    return f"{push}/ready/{rank}"


class End:
    """One end of a process group of its own, beside the default one and whatever else a process has.

    What waits for peers runs in a thread that is left behind where it does not return: nothing can
    interrupt NCCL while it looks for a peer that died, nor gloo before its timeout.
    """

    def __init__(
        self, address: str, rank: int, size: int, *, backend: Backend, timeout_s: float
    ) -> None:
        """``address``: ``host:port`` of the store; each of ``size`` processes joins as another ``rank``."""
        on_gpu = backend == "nccl"
        self._device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else "cpu"
        self._group: Any = None
        self._aborted = False
        self._over = threading.Event()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="end of a channel")
        self.joined = self.run(functools.partial(self._join, address, rank, size, timeout_s))
        """Done once all ranks are there and each has heard from rank 0."""

    @property
    def is_over(self) -> bool:
        """Whether it was closed."""
        return self._over.is_set()

    def run(self, act: Callable[[], T]) -> Future[T]:
        """Do it in the thread of this end, after all that was asked for before."""
        return self._thread.submit(act)

    def until(self, holds: Callable[[], bool]) -> None:
        """Within :meth:`run`: wait for it. RuntimeError once this end is closed, by which whoever waits
        for the whole keeps its deadline."""
        while not self.is_over:
            if holds():
                return
            time.sleep(TICK_S)
        raise RuntimeError("given up")

    def broadcast(self, tensor: Tensor) -> None:
        """Within :meth:`run`: bring rank 0's tensor into everybody's; returns once it is there, or soon
        after this end is closed; with gloo at the latest when the group's timeout is over.

        Raises:
            RuntimeError: a peer is gone, or this end was closed meanwhile.
        """
        if self._group is None:
            raise RuntimeError("the process group never came about")
        options: Any = distributed_c10d.BroadcastOptions()
        options.rootRank = 0
        work = self._group.broadcast([tensor], options)
        while not work.is_completed():
            if self.is_over:
                self._abort()
            time.sleep(TICK_S)
        if self.is_over:
            raise RuntimeError("given up")
        work.wait()

    def close(self) -> None:
        """Leave, without waiting for anybody."""
        if not self.is_over:
            self._over.set()
            self._thread.submit(self._leave)
            self._thread.shutdown(wait=False)

    def _join(self, address: str, rank: int, size: int, timeout_s: float) -> None:
        store = dist.PrefixStore("group", connect_store(address, timeout_s))  # pyright: ignore[reportPrivateImportUsage]
        timeout = datetime.timedelta(seconds=timeout_s)
        if self._device == "cpu":
            gloo: Any = distributed_c10d.ProcessGroupGloo
            options = gloo._Options()
            options._devices, options._timeout = [_loopback_device()], timeout
            self._group = gloo(store, rank, size, options)
        else:
            torch.cuda.set_device(self._device)
            nccl: Any = distributed_c10d.ProcessGroupNCCL
            options = nccl.Options()
            options._timeout = timeout + datetime.timedelta(seconds=WATCHDOG_S)
            with _environment(FATAL_ERRORS, "0"):  # who dies must not take this process along
                self._group = nccl(store, rank, size, options)
        # NCCL connects with the first operation.
        self.broadcast(torch.zeros(1, dtype=torch.uint8, device=self._device))

    def _abort(self) -> None:
        """End what is under way, where the backend can; gloo ends at its timeout."""
        if self._device != "cpu" and self._group is not None and not self._aborted:
            self._aborted = True
            self._group.abort()

    def _leave(self) -> None:
        self._abort()
        self._group = None


@contextlib.contextmanager
def _environment(name: str, value: str) -> Iterator[None]:
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        del os.environ[name]
        if before is not None:
            os.environ[name] = before


@functools.cache
def _loopback_device() -> Any:
    gloo: Any = distributed_c10d.ProcessGroupGloo
    return gloo.create_device(hostname=LOOPBACK)
