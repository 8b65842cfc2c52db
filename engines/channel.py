"""Weights by broadcast: from the trainer to servers that have GPUs of their own, all at once.

Trainer and servers are in one process group, made anew when the servers change. A push is one request
to each server, which then takes bucket after bucket; what a bucket holds stands in the group's store.
A group in which one server fails is given up: that server is named, the others too, and each may be
given the weights by a push of its own.
"""

from __future__ import annotations

import contextlib
import functools
import json
import threading
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from typing import Any

import httpx
import torch
from torch import Tensor

from . import weights
from .checksums import Named, bytes_of
from .gpu.told import Told, read
from .meeting import (
    CHANNEL,
    LAST,
    LOOPBACK,
    OVER,
    TIMEOUT,
    Backend,
    End,
    bucket_key,
    open_store,
    ready_key,
)
from .weights import Post, PushResult, WeightMismatchError, bucket_layout

BUCKET_BYTES = 1 << 30
"""Of a bucket: two at a time are in each GPU's memory."""
GRACE_S = 5.0
"""Seconds in which a server that is well answers once a broadcast was given up."""


class BrokenChannelError(httpx.TransportError):
    """A server was not reached because the broadcast to it and others was given up."""


class Channel:
    """The trainer's end of process groups with servers; a transport for :func:`.weights.push`."""

    def __init__(self, backend: Backend, timeout_s: float) -> None:
        """Each wait ends after ``timeout_s`` seconds."""
        self._backend: Backend = backend
        self._timeout_s = timeout_s
        self._link: _Link | None = None

    def push(
        self, named: Iterable[Named], urls: Sequence[str], version: int, **rest: Any
    ) -> PushResult:
        """:func:`.weights.push` through this channel; ``rest`` is passed on.

        Of the result's ``parts``, ``join`` is the making of the group, ``call`` the time until
        all servers stand ready, and ``broadcast`` that in which weights were on their way.

        Raises:
            WeightMismatchError: a server refuses, or holds something else afterwards.
        """
        started = time.perf_counter()
        failed = self._meet(urls)
        parts = {"join": time.perf_counter() - started, "call": 0.0, "broadcast": 0.0}
        alive = [url for url in urls if url not in failed]
        if self._link is not None and alive:
            self._link.begin(version, parts)
        with contextlib.ExitStack() as in_vain:
            in_vain.callback(self.close)
            result = weights.push(
                named, alive, version, timeout_s=self._timeout_s, transport=self.transport, **rest
            )
            if self._link is None or not self._link.broken:
                in_vain.pop_all()
        return replace(
            result,
            failed=(*failed.items(), *result.failed),
            seconds=time.perf_counter() - started,
            parts=result.parts | parts,
        )

    @contextlib.contextmanager
    def transport(self, bucket: Sequence[Named]) -> Iterator[Post]:
        """Packed on entering; on its way from the first post on, within :meth:`push`."""
        packed = None
        if self._link is None or not self._link.broken:
            packed = _Packed(
                layout_of(bucket), torch.cat([bytes_of(tensor) for _, tensor in bucket])
            )
            if packed.flat_B.is_cuda:
                # Another thread sends it: no order of this one's stream reaches there.
                torch.cuda.current_stream().synchronize()
        yield functools.partial(self._post, packed)

    def close(self) -> None:
        """Leave the servers; each notices at the next group that it is asked to join."""
        if self._link is not None:
            self._link.close("the trainer left")
            self._link = None

    def _post(
        self, packed: _Packed | None, client: httpx.Client, version: int | None
    ) -> Told | None:
        assert self._link is not None, "posted outside push()"
        return self._link.post(packed, client, is_last=version is not None)

    def _meet(self, urls: Sequence[str]) -> dict[str, str]:
        """Make a channel to these servers, unless there is one; who cannot be reached, and why."""
        failed: dict[str, str] = {}
        while alive := [url for url in urls if url not in failed]:
            if self._link is not None and self._link.urls == alive and not self._link.broken:
                return failed
            self.close()
            self._link = _Link(alive, self._backend, self._timeout_s)
            failed |= self._link.join()
        return failed


@dataclass(slots=True)
class _Packed:
    """A bucket: what it holds, and the bytes until they are sent."""

    layout: str
    flat_B: Tensor
    sent: Future[None] | None = None


class _Link:
    """A process group with certain servers, whole until the first of them fails."""

    def __init__(self, urls: Sequence[str], backend: Backend, timeout_s: float) -> None:
        self.urls = list(urls)
        self._over: Future[str] = Future()
        """Why all is over, once it is."""
        self._timeout_s = timeout_s
        self._name = CHANNEL + uuid.uuid4().hex
        self._lock = threading.Lock()
        self._store = open_store(LOOPBACK)
        self._store.set(TIMEOUT, str(timeout_s))
        self._pushes = 0
        self._keys: list[str] = []
        """Of the buckets of the push that is under way."""
        self._sent: list[Future[None]] = []
        """Of each of these, done when it is with all servers."""
        self._version = ""
        self._parts: dict[str, float] = {}
        self._callers = ThreadPoolExecutor(len(urls))
        address, size = f"{LOOPBACK}:{self._store.port}", len(urls) + 1
        self._end = End(address, 0, size, backend=backend, timeout_s=timeout_s)
        self._answers: dict[str, Future[str]] = {}
        """To the request that each server is at."""
        for rank, url in enumerate(urls, 1):
            body = {
                "master_address": LOOPBACK,
                "master_port": self._store.port,
                "rank_offset": rank,
                "world_size": size,
                "group_name": self._name,
                "backend": backend,
            }
            self._ask(url, "/init_weights_update_group", body)

    @property
    def broken(self) -> str:
        """Why all is over; empty while it is not."""
        return self._over.result() if self._over.done() else ""

    def join(self) -> dict[str, str]:
        """Wait for all servers; those that are dead or silent, by URL, and why.

        Raises:
            WeightMismatchError: all answer, and yet there is no group.
        """
        if self._await(self._end.joined) and all(map(self._await, [*self._answers.values()])):
            return {}
        if dead := self._dead():
            return dead
        if len(self.urls) > 1:
            return {url: str(self._failure(url, {})) for url in self.urls}
        raise WeightMismatchError(f"no process group with server {self.urls[0]}: {self.broken}")

    def begin(self, version: int, parts: dict[str, float]) -> None:
        """Whatever is posted from here on is a push of ``version``; seconds go to ``parts``."""
        for key in self._keys:
            self._store.delete_key(key)
        self._answers, self._keys, self._sent = {}, [], []
        self._version, self._parts = str(version), parts

    def post(self, packed: _Packed | None, client: httpx.Client, *, is_last: bool) -> Told | None:
        """Have one server take a bucket that is on its way to all. Each is called for each bucket.

        Raises:
            httpx.TransportError: it could not be reached, or the broadcast was given up.
            WeightMismatchError: it refuses, alone and asked for the first time.
        """
        url = str(client.base_url).rstrip("/")
        awaited = None
        with self._lock:
            if packed is not None and not self.broken:
                awaited = self._underway(url, packed, is_last=is_last)
        if awaited is not None and all(map(self._await, awaited)):
            return read(self._answers[url].result()) if is_last else None
        dead = self._dead()
        answer = self._answers.get(url)
        if answer is not None and answer.done() and answer.exception() is None:
            return read(answer.result())  # it had everything before another one failed
        raise self._failure(url, dead)

    def close(self, reason: str) -> None:
        """Give all up."""
        with self._lock:
            if not self.broken:
                self._over.set_result(reason)
                self._store.set(OVER, reason)
                self._end.close()
                self._callers.shutdown(wait=False)

    def _underway(self, url: str, packed: _Packed, *, is_last: bool) -> list[Future[Any]]:
        """Ask the server and send the bucket, unless that was done; what to wait for."""
        if not self._answers:
            self._pushes += 1
        if url not in self._answers:
            self._ask(url, "/update_weights_from_distributed", self._request())
        if packed.sent is None:
            packed.sent = self._send(packed)
            if is_last:
                self._tell(LAST)
        if is_last:
            return [self._sent[-1], self._answers[url]]
        # The bucket before, while this one is on its way and the next is packed.
        return [*self._sent[-2:-1]]

    def _request(self) -> dict[str, Any]:
        return {
            "names": [],
            "dtypes": [],
            "shapes": [],
            "group_name": self._name,
            "load_format": "flattened_bucket",
            "flush_cache": False,
            "weight_version": self._version,
        }

    def _send(self, packed: _Packed) -> Future[None]:
        """Have a bucket sent after all others; done when it is everywhere."""
        ready = [] if self._sent else self._ready()
        self._tell(packed.layout)
        self._sent.append(sent := self._end.run(functools.partial(self._sending, packed, ready)))
        return sent

    def _tell(self, layout: str) -> None:
        """Tell servers what comes next, before it does."""
        self._keys.append(key := bucket_key(self._pushes, len(self._sent)))
        self._store.set(key, layout)

    def _ready(self) -> list[str]:
        keys = [ready_key(self._pushes, rank) for rank in range(1, len(self.urls) + 1)]
        self._keys += keys
        return keys

    def _sending(self, packed: _Packed, ready: list[str]) -> None:
        started = time.perf_counter()
        if ready:
            self._end.until(lambda: self._store.check(ready))
        called = time.perf_counter()
        self._end.broadcast(packed.flat_B)
        self._parts["call"] += called - started
        self._parts["broadcast"] += time.perf_counter() - called

    def _ask(self, url: str, path: str, body: dict[str, Any]) -> None:
        self._answers[url] = self._callers.submit(
            _answer, url, path, body, self._timeout_s + 2 * GRACE_S
        )

    def _await(self, wanted: Future[Any]) -> bool:
        """Wait for it, or for whatever shows that all is over; whether it came to a good end."""
        deadline = time.monotonic() + self._timeout_s
        while not self.broken:
            left_s = deadline - time.monotonic()
            answers = [*self._answers.values()]
            if any(a.done() and a.exception() for a in answers):
                self.close("a server failed")
            elif wanted.done():
                break
            elif left_s <= 0:
                self.close(f"it took more than {self._timeout_s:g} s")
            else:
                underway = [a for a in answers if not a.done()]
                wait([wanted, self._over, *underway], left_s, FIRST_COMPLETED)
        if not wanted.done():
            return False
        if (error := wanted.exception()) is not None:
            self.close(f"{type(error).__name__}: {error}")
        return error is None

    def _dead(self) -> dict[str, str]:
        """Once all is over: servers that do not answer, by URL, and why."""
        wait(self._answers.values(), timeout=GRACE_S)
        found: dict[str, str] = {}
        for url, answer in self._answers.items():
            if not answer.done():
                found[url] = f"no answer {GRACE_S:g} s after it was given up: {self.broken}"
            elif isinstance(error := answer.exception(), httpx.TransportError):
                found[url] = f"{type(error).__name__}: {error}"
        return found

    def _failure(self, url: str, dead: Mapping[str, str]) -> BaseException:
        """What to raise for a server, once all is over; ``dead`` are those that do not answer."""
        answer = self._answers.get(url)
        if answer is not None and not answer.done():
            return httpx.ReadTimeout(dead[url])
        error = answer.exception() if answer is not None else None
        first_and_alone = self._pushes == len(self.urls) == 1
        if isinstance(error, httpx.TransportError) or (error and first_and_alone):
            return error
        culprits = "; ".join(f"{other}: {why}" for other, why in dead.items())
        return BrokenChannelError(
            f"the broadcast to it was given up because of {culprits or error or self.broken}"
        )


def layout_of(bucket: Sequence[Named]) -> str:
    """What a bucket holds, in JSON: of each tensor its name, type, shape, and first and last byte."""
    places, _ = bucket_layout(bucket)
    return json.dumps(
        [
            (p.name, str(p.dtype).removeprefix("torch."), [*p.shape], p.start_idx, p.end_idx)
            for p in places
        ]
    )


def _answer(url: str, path: str, body: dict[str, Any], timeout_s: float) -> str:
    """The message of a server; WeightMismatchError where it refuses."""
    with weights.client_of(url, timeout_s) as client:
        return weights.ok(client.post(path, json=body)).json()["message"]
