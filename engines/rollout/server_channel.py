"""Inside an SGLang server of ours: weights that the trainer broadcasts, see :mod:`rollflow.engines.channel`.

SGLang's own way waits for the trainer and for other servers without end. Here every wait ends when the
trainer gives up or is gone, so that a server is free again whatever befell the others.
"""

import contextlib
import functools
import json
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, wait
from types import SimpleNamespace
from typing import Any, TypeVar

import torch
from torch import Tensor

from rollflow.engines.gpu.server_weights import is_alone, tell
from rollflow.engines.meeting import (
    CHANNEL,
    LAST,
    OVER,
    TIMEOUT,
    End,
    bucket_key,
    connect_store,
    ready_key,
)

T = TypeVar("T")
CONNECT_S = 30.0
SPARE_S = 5.0
"""Seconds that a server waits longer than the trainer, which knows better what is wrong."""
LOOK_S = 0.05
"""Seconds between two looks at whether the trainer gave up."""
Bucket = tuple[Tensor, list[SimpleNamespace]]
"""Its bytes [B], and where each tensor lies in them."""


def install() -> None:
    """Make SGLang's weight updater do so in this process, for groups that are channels of ours."""
    from sglang.srt.managers import io_struct
    from sglang.srt.managers.scheduler_components import weight_updater

    manager = weight_updater.SchedulerWeightUpdaterManager
    held: dict[str, Receiver] = {}
    joined, updated = (
        io_struct.InitWeightsUpdateGroupReqOutput,
        io_struct.UpdateWeightsFromDistributedReqOutput,
    )
    for verb, answer, act in (
        ("init_weights_update_group", joined, functools.partial(join, held)),
        ("update_weights_from_distributed", updated, functools.partial(update, held)),
    ):
        setattr(manager, verb, _ours(getattr(manager, verb), answer, act))


def _ours(
    theirs: Callable[[Any, Any], Any], answer: Any, act: Callable[[Any, Any], str]
) -> Callable[[Any, Any], Any]:
    def handle(self: Any, recv_req: Any) -> Any:
        if not recv_req.group_name.startswith(CHANNEL):
            return theirs(self, recv_req)
        try:
            return answer(success=True, message=act(self, recv_req))
        except RuntimeError as error:  # torch's or ours: the trainer is told, the server lives on
            return answer(success=False, message=f"{type(error).__name__}: {error}")

    return handle


def join(held: dict[str, "Receiver"], manager: Any, request: Any) -> str:
    """Join a channel, and leave all others. RuntimeError where it does not come about."""
    for name in [*held]:
        held.pop(name).close()
    if not is_alone(manager):
        raise RuntimeError("weights are broadcast to servers of one rank and without a draft model")
    receiver = Receiver(request)
    with contextlib.ExitStack() as in_vain:
        in_vain.callback(receiver.close)
        receiver.join()
        in_vain.pop_all()
    held[request.group_name] = receiver
    return "joined"


def update(held: dict[str, "Receiver"], manager: Any, request: Any) -> str:
    """Load what the trainer broadcasts; what the server holds then. RuntimeError where it is given up."""
    if request.group_name not in held:
        raise RuntimeError(f"this server is not in {request.group_name}")
    load = manager.tp_worker.model_runner.weight_updater._update_weights_from_flattened_bucket
    receiver = held.pop(request.group_name)
    with contextlib.ExitStack() as in_vain:
        in_vain.callback(receiver.close)
        receiver.receive(load)
        in_vain.pop_all()
    held[request.group_name] = receiver
    return "loaded" + tell(manager)


class Receiver:
    """A server's end of a channel."""

    def __init__(self, request: Any) -> None:
        """``request``: SGLang's, which names the store and this server's rank."""
        address = f"{request.master_address}:{request.master_port}"
        self._store = connect_store(address, CONNECT_S)
        self._timeout_s = float(self._store.get(TIMEOUT))
        self._rank = request.rank_offset
        self._device = "cuda" if request.backend == "nccl" else "cpu"
        self._pushes = 0
        self._saw_last = False
        self._end = End(
            address,
            self._rank,
            request.world_size,
            backend=request.backend,
            timeout_s=self._timeout_s,
        )

    def join(self) -> None:
        """Wait for all others. RuntimeError where it does not come about."""
        self._wait(self._end.joined, "all to join")

    def receive(self, load: Callable[..., tuple[bool, str]]) -> None:
        """Take and load one bucket after the other; the next is on its way while one is loaded.

        Raises:
            RuntimeError: the trainer gave up or is gone, or a bucket is refused.
        """
        self._pushes += 1
        self._saw_last = False
        # One more than is waited for, so that the next follows at once.
        coming = deque(self._coming(number) for number in range(2))
        self._store.set(ready_key(self._pushes, self._rank), "")
        number = len(coming)
        while self._load_next(coming.popleft(), load):
            coming.append(self._coming(number))
            number += 1

    def _coming(self, number: int) -> "Future[Bucket | None]":
        return self._end.run(functools.partial(self._take, number))

    def _load_next(
        self, coming: "Future[Bucket | None]", load: Callable[..., tuple[bool, str]]
    ) -> bool:
        """Load a bucket once it is there; whether there was one."""
        bucket = self._wait(coming, "a bucket")
        if bucket is None:
            return False
        content = {"flattened_tensor": bucket[0], "metadata": bucket[1]}
        success, message = load(flattened_tensor_bucket_dict=content)
        if not success:
            raise RuntimeError(message)
        if self._device == "cuda":
            torch.cuda.current_stream().synchronize()  # the memory is used again
        return True

    def close(self) -> None:
        """Leave."""
        self._end.close()

    def _take(self, number: int) -> Bucket | None:
        """The next bucket; None behind the last."""
        key = bucket_key(self._pushes, number)
        self._end.until(lambda: self._saw_last or self._store.check([key]))
        layout = LAST if self._saw_last else self._store.get(key).decode()
        if layout == LAST:
            self._saw_last = True
            return None
        places = _places(layout)
        flat_B = torch.empty(places[-1].end_idx, dtype=torch.uint8, device=self._device)
        self._end.broadcast(flat_B)
        return flat_B, places

    def _wait(self, future: Future[T], what: str) -> T:
        deadline = time.monotonic() + self._timeout_s + SPARE_S
        while not wait([future], timeout=LOOK_S).done:
            if self._store.check([OVER]):
                raise RuntimeError(f"given up by the trainer: {self._store.get(OVER).decode()}")
            if time.monotonic() > deadline:
                raise RuntimeError(f"waited {self._timeout_s + SPARE_S:g} s for {what}")
        return future.result()


def _places(layout: str) -> list[SimpleNamespace]:
    """Where each tensor lies in a bucket, as SGLang reads it."""
    return [
        SimpleNamespace(
            name=name,
            shape=torch.Size(shape),
            dtype=getattr(torch, dtype),
            start_idx=start,
            end_idx=end,
            numel=end - start,
        )
        for name, dtype, shape, start, end in json.loads(layout)
    ]
