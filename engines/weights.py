"""How weights travel from trainer to rollout servers, and how servers prove that they hold them.

Weights travel under their Hugging Face names, flattened into buckets. After a push every server
must answer with the checksums of exactly these weights, under the names SGLang fuses them to, and
with their version. Importing this module loads no engine.
"""

from __future__ import annotations

import base64
import contextlib
import functools
import os
import pickle
import ssl
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import httpx

from .checksums import Named, Tally, add_all, bytes_of, tally_for
from .gpu.told import Told, read
from .server_names import EXPERT, server_name

if TYPE_CHECKING:
    from .published import Publication
    from .weights_on_gpu import GpuTally

BUCKET_BYTES = 512 << 20
BUSY = 400
"""What SGLang answers to a flush while it is not at rest."""
FLUSH_TIMEOUT_S, FLUSH_AGAIN_S = 60.0, 0.01
"""Seconds that a server may take to come to rest under new weights, and between two tries."""


@dataclass(frozen=True, slots=True)
class PushResult:
    """What a push did, e.g. ``PushResult(7, "ab12...", 2381312, 0.03, ("http://...",))``."""

    version: int
    digest: str
    """:func:`~.checksums.weights_digest` of what was pushed."""
    bytes: int
    seconds: float
    servers: tuple[str, ...] = ()
    """URLs that hold these weights now, verified by checksum and version."""
    failed: tuple[tuple[str, str], ...] = ()
    """(URL, reason) of servers that could not be reached; the others were not held up."""
    parts: dict[str, float] = field(default_factory=dict[str, float])
    """Of ``seconds``: ``export`` from the model, ``pack`` into buckets, ``load`` by servers, ``verify``."""


class WeightMismatchError(RuntimeError):
    """A server is there, but refuses the weights or holds others; the message names it and why."""


Post = Callable[[httpx.Client, int | None], Told | None]
"""Have one server load one bucket. The version is given with the last bucket only; one of ours on a GPU
then tells what it holds."""
Transport = Callable[[Sequence[Named]], contextlib.AbstractContextManager[Post]]
"""A way to bring a bucket to servers: enter it once per bucket, then post it to each server."""


@dataclass(frozen=True, slots=True)
class Parcel:
    """A bucket that is ready to be sent."""

    bucket: Sequence[Named]
    is_last: bool
    post: Post


class Parcels:
    """Weights in buckets, each packed when it is its turn or, by :meth:`pack`, before; one at a time."""

    def __init__(
        self, named: Iterable[Named], transport: Transport, bucket_bytes: int = BUCKET_BYTES
    ) -> None:
        self.seconds = {"export": 0.0, "pack": 0.0}
        """Spent so far on tensors from the model, and on buckets of them."""
        self._buckets = _buckets(named, bucket_bytes)
        self._transport = transport
        self._sending = contextlib.ExitStack()
        self._next: Parcel | None = None

    def pack(self) -> None:
        """Pack the next bucket, unless it is packed; the one before is given up."""
        if self._next is not None:
            return
        self._sending.close()
        with _added_to(self.seconds, "export"):
            bucket, is_last = next(self._buckets, ([], True))
        if bucket:
            with _added_to(self.seconds, "pack"):
                post = self._sending.enter_context(self._transport(bucket))
            self._next = Parcel(bucket, is_last, post)

    def __iter__(self) -> Iterator[Parcel]:
        """Each is there until the next is asked for."""
        while True:
            self.pack()
            parcel, self._next = self._next, None
            if parcel is None:
                return
            yield parcel

    def close(self) -> None:
        """Give up what is packed."""
        self._next = None
        self._sending.close()


def nowhere(bucket: Sequence[Named]) -> contextlib.AbstractContextManager[Post]:
    """A transport to no server."""
    return contextlib.nullcontext(lambda client, version: None)


def push(
    named: Iterable[Named],
    urls: Sequence[str],
    version: int,
    *,
    timeout_s: float,
    transport: Transport | None = None,
    counted: Tally | GpuTally | None = None,
    publication: Publication | None = None,
    bucket_bytes: int = BUCKET_BYTES,
    parcels: Parcels | None = None,
) -> PushResult:
    """Bring weights to each server under ``version`` and verify what each holds then.

    ``counted``: the tally of these weights, where it is known already. ``publication``: written
    meanwhile, for servers that load files. ``parcels``: ``named``, ready to be sent; ``counted`` goes
    with it, and ``publication`` does not.

    Servers are served side by side, each wait ends after ``timeout_s`` seconds. One that is dead or
    silent is named in the result; the rest proceed. ``transport`` is :func:`mapped_file` by
    default, for servers on this machine.

    Raises:
        WeightMismatchError: a server answered with an error, or holds something else afterwards.
    """
    started = time.perf_counter()
    seconds = {"load": 0.0, "verify": 0.0}
    for_servers = bool(urls) or publication is not None
    tally, named = (counted, named) if counted else tally_for(named, for_servers=for_servers)
    named = publication.passing(named) if publication else named
    parcels = parcels or Parcels(
        named, (transport or mapped_file) if urls else nowhere, bucket_bytes
    )
    before = dict(parcels.seconds)
    failed: dict[str, str] = {}
    told: dict[str, Told | None] = {}
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.closing(parcels))
        clients = {url: stack.enter_context(client_of(url, timeout_s)) for url in urls}
        pool = stack.enter_context(ThreadPoolExecutor(max(1, len(urls))))

        def each(act: Callable[[str], None], meanwhile: Callable[[], None] = lambda: None) -> None:
            alive = [url for url in urls if url not in failed]
            reasons = pool.map(lambda url: _reason(act, url), alive)
            meanwhile()
            failed.update((u, r) for u, r in zip(alive, reasons, strict=True) if r)

        def load(parcel: Parcel, url: str) -> None:
            told[url] = parcel.post(clients[url], version if parcel.is_last else None)

        for parcel in parcels:
            count_it = functools.partial(add_all, tally, () if counted else parcel.bucket)
            with _added_to(seconds, "load"):
                each(functools.partial(load, parcel), count_it)
        with _added_to(seconds, "verify"):
            checksums = tally.server_checksums()
            each(lambda url: settle(clients[url], checksums, version, told.get(url)))
    if publication is not None:
        publication.finish(tally.digest(), checksums)
    packing = {part: spent - before[part] for part, spent in parcels.seconds.items()}
    return PushResult(
        version=version,
        digest=tally.digest(),
        bytes=tally.bytes,
        seconds=time.perf_counter() - started,
        servers=tuple(url for url in urls if url not in failed),
        failed=tuple(failed.items()),
        parts=packing | seconds,
    )


@contextlib.contextmanager
def _added_to(parts: dict[str, float], name: str) -> Iterator[None]:
    started = time.perf_counter()
    try:
        yield
    finally:
        parts[name] += time.perf_counter() - started


def client_of(url: str, timeout_s: float) -> httpx.Client:
    """A client of one server, whose waits end after ``timeout_s`` seconds."""
    # Servers speak plain HTTP; a context without authorities spares reading all of them.
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    return httpx.Client(base_url=url, timeout=timeout_s, trust_env=False, verify=tls)


def settle(
    client: httpx.Client,
    checksums: Mapping[str, str],
    version: int | str,
    told: Told | None = None,
) -> None:
    """:func:`flush` and :func:`verify` at once: nothing is generated before both are done.

    ``told``: what the server said of itself already; it is asked for the rest.
    """
    if told is not None:
        _compare(client, checksums, told.checksums, version)
        if not told.flushed:
            flush(client)
        if not told.is_called(version):
            _called(client, version)
        return
    with ThreadPoolExecutor(2) as beside:
        others = [beside.submit(flush, client), beside.submit(_called, client, version)]
        _holds(client, checksums, version)
        for other in others:
            other.result()


def verify(client: httpx.Client, checksums: Mapping[str, str], version: int | str) -> None:
    """The server holds exactly the weights of ``checksums`` and calls them ``version``.

    Raises:
        WeightMismatchError: it does not, or answers with an error.
        httpx.TransportError: it does not answer.
    """
    _holds(client, checksums, version)
    _called(client, version)


def _holds(client: httpx.Client, checksums: Mapping[str, str], version: int | str) -> None:
    answer = ok(client.post("/weights_checker", json={"action": "checksum"})).json()
    for rank in answer["ranks"]:
        _compare(client, checksums, rank["checksums"], version)


def _compare(
    client: httpx.Client,
    checksums: Mapping[str, str],
    found: Mapping[str, str],
    version: int | str,
) -> None:
    wrong = sorted(n for n in checksums.keys() | found if checksums.get(n) != found.get(n))
    if wrong:
        raise WeightMismatchError(
            f"server {client.base_url} holds other weights than version {version} pushed to "
            f"it: {len(wrong)} of {len(checksums)} parameters differ, first {wrong[0]} "
            f"(checksum {found.get(wrong[0])}, pushed {checksums.get(wrong[0])})"
        )


def _called(client: httpx.Client, version: int | str) -> None:
    told = ok(client.get("/model_info")).json().get("weight_version")
    if told != str(version):
        raise WeightMismatchError(
            f"server {client.base_url} says weight version {told!r} after version {version} was "
            "pushed to it"
        )


def bucket_layout(bucket: Sequence[Named]) -> tuple[list[SimpleNamespace], int]:
    """(where each tensor lies in a flattened bucket, as SGLang reads it; bytes of the bucket)."""
    places: list[SimpleNamespace] = []
    start = 0
    for name, tensor in bucket:
        end = start + tensor.nbytes
        places.append(
            SimpleNamespace(
                name=name,
                shape=tensor.shape,
                dtype=tensor.dtype,
                start_idx=start,
                end_idx=end,
                numel=tensor.nbytes,
            )
        )
        start = end
    return places, start


@contextlib.contextmanager
def mapped_file(bucket: Sequence[Named]) -> Iterator[Post]:
    """A transport to servers on this machine: both sides map one file that is only in memory.

    The request names the file; the server maps it by PyTorch's own ``from_file``. Nothing of either
    side waits for the other's process, so a dead one cannot block the other, and the file ends with
    this process. Chosen over sharing by torch.multiprocessing (a helper process, and a wrong key
    ends the server) and over a gloo group (both sides block when one dies), which are as fast.
    """
    import torch

    places, size = bucket_layout(bucket)
    descriptor = os.memfd_create("rollflow-weights")
    try:
        os.ftruncate(descriptor, size)
        path = f"/proc/{os.getpid()}/fd/{descriptor}"
        flat = torch.from_file(path, shared=True, size=size, dtype=torch.uint8)
        for place, (_, tensor) in zip(places, bucket, strict=True):
            flat[place.start_idx : place.end_idx] = bytes_of(tensor)
        content = {"flattened_tensor": _MappedBytes(path, size), "metadata": places}
        payload = base64.b64encode(pickle.dumps(content, protocol=5)).decode()
        yield functools.partial(post_tensors, payload)
    finally:
        os.close(descriptor)


class _MappedBytes:
    """Unpickled anywhere on this machine, it is the uint8 tensor over the file."""

    def __init__(self, path: str, size: int) -> None:
        self.path, self.size = path, size

    def __reduce__(self) -> tuple[Any, ...]:
        import torch

        build = functools.partial(torch.from_file, dtype=torch.uint8)
        # Not shared: opened for reading only, so a late reader cannot make the file anew.
        return build, (self.path, False, self.size)


def post_tensors(payload: str, client: httpx.Client, version: int | None) -> Told | None:
    """Have a server load one flattened bucket, pickled in base64; the version comes with the last."""
    body: dict[str, Any] = {
        "serialized_named_tensors": [payload],
        "load_format": "flattened_bucket",
        "flush_cache": False,
    }
    if version is not None:
        body["weight_version"] = str(version)
    answer = ok(client.post("/update_weights_from_tensor", json=body)).json()
    return read(answer.get("message", ""))


def flush(client: httpx.Client) -> None:
    """Have a server forget the keys and values of older weights, once it has put away what it is at.

    The flush that comes with an update does not wait: a health check on its way ends the server.

    Raises:
        WeightMismatchError: it is not at rest in time, or answers with another error.
        httpx.TransportError: it does not answer.
    """
    begun = time.monotonic()
    while (answer := client.post("/flush_cache", params={"timeout": 1})).status_code == BUSY:
        if time.monotonic() - begun > FLUSH_TIMEOUT_S:
            raise WeightMismatchError(
                f"server {client.base_url} still works on requests {FLUSH_TIMEOUT_S:.0f} s after it "
                f"was given new weights: {answer.text[:300]}"
            )
        time.sleep(FLUSH_AGAIN_S)
    ok(answer)


def ok(response: httpx.Response) -> httpx.Response:
    """The response; WeightMismatchError where the server refused."""
    if response.is_error:
        raise WeightMismatchError(
            f"server {response.url} answered {response.status_code}: {response.text[:300]}"
        )
    return response


def _reason(act: Callable[[str], None], url: str) -> str:
    """Why ``act`` could not reach the server; empty if it did."""
    try:
        act(url)
    except httpx.TransportError as error:
        return f"{type(error).__name__}: {error}"
    return ""


def _buckets(named: Iterable[Named], bucket_bytes: int) -> Iterator[tuple[list[Named], bool]]:
    """Cut into buckets of about ``bucket_bytes``, and say which is the last. Parts of what servers fuse
    stay together, but for experts."""
    bucket: list[Named] = []
    size = 0
    for name, tensor in named:
        tensor_bytes = tensor.numel() * tensor.element_size()
        begins = server_name(name)[1] == 0 or EXPERT.fullmatch(name) is not None
        if bucket and begins and size + tensor_bytes > bucket_bytes:
            yield bucket, False
            bucket, size = [], 0
        bucket.append((name, tensor))
        size += tensor_bytes
    if bucket:
        yield bucket, True
