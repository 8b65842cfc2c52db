"""Servers that somebody else runs: watched, left out while they cannot be relied on, taken back.

Their processes are never touched. One gets requests only while it answers in time and holds the
right weights, which it loads from files that the trainer publishes. The weights have a name that no
other run gives, so an engine that another run has changed is noticed by its first answer.
"""

import asyncio
import json
import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import httpx

from rollflow.engines import published
from rollflow.engines.config import ModelConfig
from rollflow.engines.published import Published
from rollflow.engines.weights import WeightMismatchError
from rollflow.storage.objects import normalised_url

from .config_servers import ExternalConfig
from .router import Router, wait_for_server
from .server import ServerError

SILENT_AFTER = 3
"""Health checks in a row that may be late or refused."""
MOST_CHECKS = 32
"""Health checks in a row, at most, before one that was left out often is taken back."""
STEADY = 30
"""Health checks in a row after which earlier absences are forgotten."""
POSTED_TO = ("/update_weights_from_disk", "/abort_request")
"""Endpoints that an engine must have; they take POST alone, so a GET tells without harm."""

Publish = Callable[[int], Awaitable[object]]
"""Have the trainer publish the weights of a version."""


@dataclass(slots=True)
class _Server:
    url: str
    away: str = ""
    """Why it gets no requests; empty while it may."""
    since: float = 0.0
    """When it was left out."""
    label: str = ""
    """Name of the weights that were verified on it."""
    registered: bool = False
    faults: int = 0
    """Health checks in a row that it failed while in service."""
    good: int = 0
    """Health checks in a row that it passed."""
    absences: int = 0
    watcher: asyncio.Task[None] | None = None
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)

    @property
    def checks_needed(self) -> int:
        """Passed health checks in a row before it is taken back: twice as many each time."""
        return min(2 ** max(0, self.absences - 1), MOST_CHECKS)


class Externals:
    """The servers of ``rollout.external``, for one run whose weights are published in ``place``.

    ``left_out`` is called whenever one is left out, and told whether it may still hold requests.
    """

    def __init__(
        self,
        config: ExternalConfig,
        model: ModelConfig,
        place: str,
        router: Router,
        left_out: Callable[[bool], None],
    ) -> None:
        self._config, self._model, self._place, self._router = config, model, place, router
        self._left_out = left_out
        self._servers = [_Server(url) for url in config.urls]
        self._current: Published | None = None
        self._finding = asyncio.Lock()
        self._session = aiohttp.ClientSession(
            timeout=aiohttp.ClientTimeout(config.timeout_s, sock_connect=config.slow_s)
        )
        self.publish: Publish | None = None
        self.notices: list[str] = []
        """What happened to the servers since somebody last looked."""

    @property
    def label(self) -> str:
        """Name of the weights that are served now; empty where nothing is."""
        return self._current.label if self._current else ""

    @property
    def ready(self) -> bool:
        """Whether one of them can answer."""
        label = self.label
        return bool(label) and any(s.registered and s.label == label for s in self._servers)

    @property
    def in_service(self) -> int:
        """How many are not left out."""
        return sum(not server.away for server in self._servers)

    async def start(self, *, alone: bool) -> None:
        """Wait for the servers; one that stays silent is left out and named.

        Raises:
            ValueError: one of them is another engine than the policy needs; says which and how.
            ServerError: none answers, and the run is ``alone`` with them.
        """
        await asyncio.to_thread(published.remove_all, self._place)
        await asyncio.gather(*(self._meet(server) for server in self._servers))
        if alone and all(server.away for server in self._servers):
            raise ServerError(self._no_one())
        for server in self._servers:
            server.watcher = asyncio.create_task(self._watch(server))

    async def admit(self, version: int) -> None:
        """Give every server that is not left out the weights of ``version``, or leave it out too."""
        async with self._finding:
            if self._current is None or self._current.version != version:
                self._current = await self._published(version)
        await asyncio.gather(*(self._admit(server) for server in self._servers))

    def withdraw(self) -> None:
        """Nothing is served for now."""
        self._current = None

    def check(self) -> None:
        """Raise ServerError where all have been away for ``timeout_s``; each is named, with why."""
        recent = time.monotonic() - self._config.timeout_s
        if all(server.away and server.since < recent for server in self._servers):
            raise ServerError(self._no_one())

    async def look_again(self) -> None:
        """Leave out each that holds other weights than those served now."""

        async def look(server: _Server) -> None:
            async with server.lock:
                await self._look_at(server)

        await asyncio.gather(*(look(server) for server in self._servers))

    async def abort(self, body: dict[str, Any], timeout_s: float) -> None:
        """Have each stop requests; one that does not answer in time is not waited for."""
        await asyncio.gather(
            *(
                self._request("POST", f"{s.url}/abort_request", body, timeout_s)
                for s in self._servers
                if s.registered
            ),
            return_exceptions=True,
        )

    async def stop(self) -> None:
        """Let the servers be, and remove what was published for them."""
        watchers = [server.watcher for server in self._servers if server.watcher]
        for watcher in watchers:
            watcher.cancel()
        await asyncio.gather(*watchers, return_exceptions=True)
        await self._session.close()
        await asyncio.to_thread(published.remove_all, self._place)

    async def _meet(self, server: _Server) -> None:
        try:
            await wait_for_server("rollout.external.urls", server.url, self._config.timeout_s)
            wrong = await self._wrong(server.url)
        except (ServerError, aiohttp.ClientError, TimeoutError) as error:
            await self._leave_out(server, _said(error), holds_requests=False)
            return
        if wrong:
            raise ValueError(f"rollout.external.urls: the engine at {server.url} {wrong}")

    async def _published(self, version: int) -> Published:
        found = await asyncio.to_thread(published.find, self._place, version)
        if found is None and self.publish is not None:
            await self.publish(version)
            found = await asyncio.to_thread(published.find, self._place, version)
        elif found is None:  # nothing is trained: the model's own files are what is asked for
            path, dtype = Path(self._model.path), self._model.dtype
            found = await asyncio.to_thread(
                published.publish_files, self._place, version, path, dtype
            )
        if found is None:
            raise ServerError(
                f"version {version} is not in {self._place} after the trainer published it; is "
                "that folder the same on the trainer's machine and on this one?"
            )
        return found

    async def _admit(self, server: _Server) -> None:
        if server.away:  # its watcher gives it what is served when it takes it back
            return
        async with server.lock:
            if not server.away and (fault := await self._give(server)):
                await self._leave_out(server, fault, holds_requests=False)

    async def _give(self, server: _Server) -> str:
        """Make sure of the weights, then let the router send requests; why that cannot be."""
        try:
            while (current := self._current) is not None:
                await self._load(server, current)
                if not server.registered:
                    await self._router.register(server.url, self._config.timeout_s)
                    server.registered = True
                if self._current is current:
                    break
        except (
            WeightMismatchError,
            ServerError,
            httpx.HTTPError,
            aiohttp.ClientError,
            TimeoutError,
        ) as error:
            return _said(error)
        return ""

    async def _load(self, server: _Server, current: Published) -> None:
        if server.label == current.label and await self._held(server) == current.label:
            return
        server.label = ""
        await self._held(server)  # one that is silent is found out sooner than by a load
        path, timeout_s = self._seen(current), self._config.timeout_s
        await asyncio.to_thread(published.load, server.url, path, current, timeout_s)
        server.label = current.label

    def _seen(self, current: Published) -> str:
        """The folder as the servers see it."""
        if not self._config.seen_as:
            return current.url
        below = current.url.removeprefix(normalised_url(self._config.weights))
        return self._config.seen_as.rstrip("/") + below

    async def _watch(self, server: _Server) -> None:
        while True:
            await asyncio.sleep(self._config.health_every_s)
            fault, is_gone = await self._fault(server)
            try:
                async with server.lock:
                    if server.away:
                        await self._take_back(server, fault)
                    else:
                        await self._keep(server, fault, is_gone)
            except (ServerError, aiohttp.ClientError, TimeoutError) as error:
                self._tell(f"rollout.external: the router does not obey: {_said(error)}")

    async def _fault(self, server: _Server) -> tuple[str, bool]:
        """(what is wrong with the server's health, whether nothing listens there at all)."""
        slow_s = self._config.slow_s
        try:
            await self._request("GET", f"{server.url}/health_generate", None, slow_s)
        except TimeoutError:
            return f"a health check took more than {slow_s:g} s", False
        except aiohttp.ClientError as error:
            return _said(error), isinstance(error, aiohttp.ClientConnectorError)
        return "", False

    async def _keep(self, server: _Server, fault: str, is_gone: bool) -> None:
        if not fault:
            server.faults, server.good = 0, server.good + 1
            if server.good >= STEADY:
                server.absences = 0
            await self._look_at(server)
            return
        server.faults, server.good = server.faults + 1, 0
        if is_gone:
            await self._leave_out(server, fault)
        elif server.faults >= SILENT_AFTER:
            await self._leave_out(server, f"{fault}, {SILENT_AFTER} times in a row")

    async def _take_back(self, server: _Server, fault: str) -> None:
        if server.registered:  # the router did not obey the first time
            await self._unregister(server)
        if fault:
            server.away, server.good = fault, 0
            return
        server.good += 1
        if server.good < server.checks_needed:
            return
        try:
            wrong = await self._wrong(server.url)  # it may have been started again, as another one
        except (aiohttp.ClientError, TimeoutError) as error:
            wrong = _said(error)
        if wrong := wrong or await self._give(server):
            server.away, server.good = wrong, 0
            return
        server.away, server.faults = "", 0
        self._tell(f"rollout.external: {server.url} is in service again")

    async def _look_at(self, server: _Server) -> None:
        if server.away or not server.registered:
            return
        try:
            held = await self._held(server)
        except TimeoutError:
            late = f"to tell its weights' version took more than {self._config.slow_s:g} s"
            await self._leave_out(server, late)
            return
        except aiohttp.ClientError as error:
            await self._leave_out(server, _said(error))
            return
        if held != server.label:
            fault = f"it holds weights {held!r} where {server.label!r} were loaded into it"
            await self._leave_out(server, fault)

    async def _leave_out(self, server: _Server, fault: str, *, holds_requests: bool = True) -> None:
        server.away, server.since = fault, time.monotonic()
        server.absences += 1
        server.label, server.good, server.faults = "", 0, 0
        needed = server.checks_needed
        often = f" (left out {server.absences} times)" if server.absences > 1 else ""
        self._tell(
            f"rollout.external: {server.url} gets no requests{often}: {fault}; it is taken back "
            f"after {needed} good health check{'s' * (needed > 1)} in a row"
        )
        self._left_out(holds_requests)
        if server.registered:
            await self._unregister(server)

    async def _unregister(self, server: _Server) -> None:
        await self._router.unregister(server.url)
        server.registered = False

    def _tell(self, notice: str) -> None:
        logging.getLogger("rollflow").warning(notice)
        self.notices.append(notice)

    def _no_one(self) -> str:
        reasons = "; ".join(f"{server.url}: {server.away}" for server in self._servers)
        return (
            f"no server of rollout.external.urls is left ({reasons}); mend one of them, or set "
            "rollout.servers or rollout.external.spares"
        )

    async def _wrong(self, url: str) -> str:
        """How an engine differs from what the policy needs; empty where it can be used."""
        model = json.loads((Path(self._model.path) / "config.json").read_text())
        info = await self._request("GET", f"{url}/model_info")
        served, needed = info.get("architectures"), model["architectures"]
        if served != needed or not info.get("is_generation"):
            return f"serves {info.get('model_path')!r}, a {served}; the policy is a {needed}"
        told = await self._request("GET", f"{url}/server_info")
        if missing := await self._missing(url):
            return f"is SGLang {told.get('version')}, which has no {missing}; start another there"
        if (dtype := told.get("dtype")) not in (None, "auto", self._model.dtype):
            return f"computes in {dtype}, model.dtype is {self._model.dtype}; make them the same"
        if (ranks := int(told.get("tp_size", 1)) * int(told.get("pp_size", 1))) > 1:
            return f"is spread over {ranks} processes; its weights can be verified in one alone"
        size = model["vocab_size"]
        if await self._takes_token(url, size) or not await self._takes_token(url, size - 1):
            return f"serves a model with another vocabulary than the policy's {size} tokens"
        return ""

    async def _missing(self, url: str) -> str:
        for path in POSTED_TO:
            async with self._session.get(url + path) as response:
                if response.status == 404:
                    return path
        body = {"action": "checksum"}
        async with self._session.post(f"{url}/weights_checker", json=body) as response:
            return "checksums at /weights_checker" if response.status != 200 else ""

    async def _takes_token(self, url: str, token: int) -> bool:
        """Whether a token is in the vocabulary: SGLang refuses a bias, even of 0, for one that is not."""
        sampling = {"max_new_tokens": 1, "logit_bias": {str(token): 0.0}}
        body = {"input_ids": [0], "sampling_params": sampling}
        async with self._session.post(f"{url}/generate", json=body) as response:
            if response.status >= 500:
                response.raise_for_status()
            return response.status == 200

    async def _held(self, server: _Server) -> str:
        url = f"{server.url}/model_info"
        info = await self._request("GET", url, None, self._config.slow_s)
        return str(info.get("weight_version"))

    async def _request(
        self, method: str, url: str, body: object = None, timeout_s: float | None = None
    ) -> Any:
        timeout = aiohttp.ClientTimeout(timeout_s or self._config.timeout_s)
        async with self._session.request(method, url, json=body, timeout=timeout) as response:
            response.raise_for_status()
            return await response.json() if response.content_type == "application/json" else None


def _said(error: BaseException) -> str:
    return str(error) or repr(error)
