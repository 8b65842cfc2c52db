"""The servers behind the router: started together, watched, and replaced when they die.

A server receives requests only while it is known to hold the weights of the step: it is *admitted*
after its version was read back, and a server that was started again is given the weights first.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import ray
from ray.exceptions import RayActorError, RayError

from rollflow.engines.config import ModelConfig
from rollflow.engines.platform import SHARE, Device

from .config import RolloutConfig
from .router import Router
from .server import POLL_S, ServerActor, ServerEndedError, ServerError, ServerInfo
from .server_args import deterministic_arguments, gpus_per_server, shared_gpu_arguments

LoadWeights = Callable[[str, int], Awaitable[object]]
"""Brings the weights of a version to the server at a URL. RayError where they are gone: the trainer
has newer ones by now."""

START_TIMEOUT_S = 600.0
MAX_RESTARTS = 3
"""Times that one server is started again within one step."""
HEALTH_EVERY_S = 20.0
SILENT_AFTER = 3
"""Health checks in a row that a server may leave unanswered."""
WEIGHTS, KV_CACHE, CUDA_GRAPH = "weights", "kv_cache", "cuda_graph"
"""SGLang's tags of what a server can give back to the GPU."""
IDLE_TIMEOUT_S = 60.0
"""Seconds that a server may take to put away its last answers before it sleeps."""
FROM_DISK = "default"
"""What SGLang calls the version of weights that it loaded itself."""


@dataclass(slots=True)
class _Slot:
    index: int
    actor: Any = None
    """Ray handle of the ServerActor."""
    info: ServerInfo | None = None
    """None while the server is down."""
    admitted: bool = False
    registered: bool = False
    asleep: set[str] = field(default_factory=set[str])
    """Tags of what the server has given back."""
    restarts: int = 0
    error: BaseException | None = None
    """Set when the server is given up."""
    watcher: asyncio.Task[None] | None = None
    admission: asyncio.Task[None] | None = None
    """Gives a server that was started again the weights, while it is watched already."""
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)

    @property
    def name(self) -> str:
        return f"server-{self.index}"


class Fleet:
    """``rollout.servers`` SGLang servers and their router."""

    def __init__(
        self,
        model: ModelConfig,
        rollout: RolloutConfig,
        sglang: Mapping[str, Any],
        router: Mapping[str, Any],
        device: Device,
        log_dir: Path,
        *,
        shares_gpu: bool = False,
    ) -> None:
        self._model = model
        fixed = deterministic_arguments(device) if rollout.deterministic else {}
        shared = shared_gpu_arguments() if shares_gpu else {}
        self._sglang = {**fixed, **shared, **sglang}
        self._shares_gpu = shares_gpu
        self._device: Device = device
        self._log_dir = log_dir
        self._seed = rollout.seed
        self._exact = rollout.deterministic
        """Which weights answer a request may not depend on when a server came back."""
        self._slots = [_Slot(i) for i in range(rollout.servers)]
        self._version: int | None = None
        self._users = 0
        self.router = Router(router, log_dir, device, rollout.request_timeout_s)
        self._session = aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(60))
        self.load_weights: LoadWeights | None = None

    async def start(self) -> None:
        """Start router and servers at once; ServerError names the one that does not come up."""
        await asyncio.gather(
            self.router.wait_until_up(START_TIMEOUT_S),
            *(self._bring_up(slot) for slot in self._slots),
        )
        await asyncio.gather(*(self._register(slot) for slot in self._slots))
        for slot in self._slots:
            slot.watcher = asyncio.create_task(self._keep(slot))

    async def servers(self, at_least: int = 1) -> list[ServerInfo]:
        """The servers that are up; waits for ``at_least`` so many.

        ServerError when one was given up.
        """
        while True:
            self._check()
            up = [slot.info for slot in self._slots if slot.info]
            if len(up) >= at_least:
                return up
            await asyncio.sleep(POLL_S)

    @asynccontextmanager
    async def serving(self, version: int) -> AsyncIterator[None]:
        """Within the context every server that gets requests holds the weights of ``version``.

        A server that is being started again does not delay it, and joins once it has them too.
        """
        if self._version not in (None, version):
            raise ValueError(f"version {version} was asked for while {self._version} is served")
        self._version = version
        self._users += 1
        try:
            await asyncio.gather(*(self._admit_when_up(s) for s in self._slots if s.info))
            await self.wait_ready()
            yield
        finally:
            self._users -= 1
            if not self._users:
                self._version = None
                for slot in self._slots:
                    slot.admitted, slot.restarts = False, 0

    async def update(self, version: int) -> None:
        """Within :meth:`serving`, go over to the weights of a newer ``version``.

        Servers that were given them are admitted again, others once they have them. Nothing may
        be sent meanwhile. ServerError when one was given up.
        """
        if not self._users:
            return
        self._version = version
        for slot in self._slots:
            slot.admitted = False
        await asyncio.gather(*(self._admit_when_up(s) for s in self._slots if s.info))
        await self.wait_ready()

    async def abort(self, request: str | None) -> None:
        """Have every server that is up stop a request, or all; one that does not answer is over
        anyhow."""
        body = {"abort_all": True} if request is None else {"rid": request}
        urls = [f"{slot.info.url}/abort_request" for slot in self._slots if slot.info]
        await asyncio.gather(
            *(self._request("POST", url, body) for url in urls), return_exceptions=True
        )

    async def wait_ready(self) -> None:
        """Wait until a server can answer; ServerError when one was given up or the router ended."""
        self._check()
        while not any(slot.admitted for slot in self._slots):
            await asyncio.sleep(POLL_S)
            self._check()

    async def post(self, path: str, body: Mapping[str, Any]) -> None:
        """Send one control request to every server itself: the router does not pass these on."""
        for server in await self.servers():
            await self._request("POST", server.url + path, dict(body))

    async def sleep(self) -> None:
        """Give the GPU's memory back: weights, keys and values, graphs. What they held is lost.

        Nothing may be in flight. ServerError names a server that does not come to rest.
        """
        tags = {WEIGHTS, KV_CACHE, CUDA_GRAPH}
        await asyncio.gather(*(self._sleep(slot, tags) for slot in self._slots if slot.info))

    async def wake(self, *tags: str) -> None:
        """Take the memory behind ``tags``, or all, back; weights have to be loaded then."""
        wanted = set(tags) or {WEIGHTS, KV_CACHE, CUDA_GRAPH}
        await asyncio.gather(*(self._wake(slot, wanted) for slot in self._slots if slot.info))

    async def stop(self) -> None:
        """End everything that was started."""
        tasks = [t for slot in self._slots for t in (slot.watcher, slot.admission) if t]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        actors = [slot.actor for slot in self._slots if slot.actor]
        await asyncio.gather(*(a.stop.remote() for a in actors), return_exceptions=True)
        for actor in actors:
            ray.kill(actor)
        await self.router.stop()
        await self._session.close()

    def _check(self) -> None:
        self.router.check()
        for slot in self._slots:
            if slot.error:
                raise slot.error

    async def _sleep(self, slot: _Slot, tags: set[str]) -> None:
        assert slot.info is not None
        url, due = slot.info.url, sorted(tags - slot.asleep)
        if not due:
            return
        try:
            async with asyncio.timeout(IDLE_TIMEOUT_S):
                while not await self._is_idle(url):
                    await asyncio.sleep(POLL_S)
            await self._request("POST", f"{url}/release_memory_occupation", {"tags": due})
        except aiohttp.ClientConnectionError:
            return  # it has just died: the watcher starts it again
        except TimeoutError as error:
            raise ServerError(
                f"{slot.name} still works on requests {IDLE_TIMEOUT_S:.0f} s after the last answer"
            ) from error
        slot.asleep |= tags

    async def _is_idle(self, url: str) -> bool:
        """Whether the server has put its last answer away; it then has nothing in its caches."""
        async with self._session.post(f"{url}/flush_cache") as response:
            return response.status == 200

    async def _wake(self, slot: _Slot, tags: set[str]) -> None:
        assert slot.info is not None
        if due := sorted(tags & slot.asleep):
            try:
                url = f"{slot.info.url}/resume_memory_occupation"
                await self._request("POST", url, {"tags": due})
            except aiohttp.ClientConnectionError:
                return  # it has just died: the watcher starts it again
            slot.asleep -= tags

    async def _bring_up(self, slot: _Slot) -> None:
        if slot.actor is None:
            slot.actor = self._new_actor(slot.name)
        seed = self._seed * len(self._slots) + slot.index + 1
        info = await slot.actor.start.remote(self._model, self._sglang, seed, START_TIMEOUT_S)
        await self._request("POST", f"{info.url}/freeze_gc")  # a full collection takes 0.3 s
        slot.info, slot.asleep = info, set()

    def _new_actor(self, name: str) -> Any:
        gpus = gpus_per_server(self._sglang, self._device)
        gpus = SHARE * gpus if self._shares_gpu else gpus
        actor = ray.remote(ServerActor).options(num_cpus=0, num_gpus=gpus, max_concurrency=8)
        return actor.remote(name, str(self._log_dir), self._device)

    async def _keep(self, slot: _Slot) -> None:
        """Start the server again each time it ends, until it has done so too often."""
        while True:
            reason = await self._end_of(slot)
            url = slot.info.url if slot.info else ""
            if slot.admission is not None:
                slot.admission.cancel()
            slot.info, slot.admitted, slot.registered = None, False, False
            try:
                await self.router.unregister(url)
                slot.restarts += 1
                if slot.restarts > MAX_RESTARTS:
                    raise ServerError(f"given up after {MAX_RESTARTS} restarts: {reason}")
                await self._bring_up(slot)
                if self._version is not None:
                    slot.admission = asyncio.create_task(self._admit_again(slot))
            except RayActorError:
                slot.actor = None
            except (ServerError, aiohttp.ClientError, TimeoutError) as error:
                slot.error = error
                return

    async def _admit_again(self, slot: _Slot) -> None:
        try:
            await self._admit_when_up(slot)
        except (ServerError, aiohttp.ClientError, TimeoutError) as error:
            slot.error = error

    async def _end_of(self, slot: _Slot) -> str:
        """Return why the server is over: it ended, its actor did, or it fell silent."""
        if slot.actor is None or slot.info is None:
            return f"{slot.name}'s actor ended"
        end = asyncio.ensure_future(_result(slot.actor.wait_for_end.remote()))
        unanswered = 0
        try:
            while unanswered < SILENT_AFTER:
                done, _ = await asyncio.wait({end}, timeout=HEALTH_EVERY_S)
                if done:
                    return end.result()
                healthy = self._version is None or await self._is_healthy(slot.info.url)
                unanswered = 0 if healthy else unanswered + 1
        except RayActorError as error:
            slot.actor = None
            return f"{slot.name}'s actor ended: {error}"
        finally:
            end.cancel()
        return f"{slot.name} left {SILENT_AFTER} health checks unanswered"

    async def _is_healthy(self, url: str) -> bool:
        try:
            await self._request("GET", f"{url}/health_generate")
        except (aiohttp.ClientError, TimeoutError):
            return False
        return True

    async def _when_up(self, slot: _Slot) -> ServerInfo:
        while slot.info is None:
            self._check()
            await asyncio.sleep(POLL_S)
        return slot.info

    async def _admit_when_up(self, slot: _Slot) -> None:
        while not slot.admitted:
            info = await self._when_up(slot)
            try:
                await self._admit(slot, info)
            except (aiohttp.ClientError, TimeoutError, ServerEndedError):
                await asyncio.sleep(POLL_S)  # it has just died: the watcher starts it again
            except RayError as error:
                if self._exact:
                    raise ServerError(f"{info.url} cannot get version {self._version}") from error
                await asyncio.sleep(POLL_S)  # the trainer is ahead: its weights come to all soon
            self._check()
            if self._version is None:
                return

    async def _admit(self, slot: _Slot, info: ServerInfo) -> None:
        """Make sure of the weights, then let the router send requests."""
        async with slot.lock:
            version = self._version
            if version is None or slot.admitted:
                return
            if await self._held_version(info) != str(version):
                await self._load(info, version)
            if not slot.registered:
                await self._register(slot)
            slot.admitted = slot.info is info and version == self._version

    async def _register(self, slot: _Slot) -> None:
        """Wait until the router finds the server healthy; ServerEndedError where it ends before."""
        assert slot.info is not None
        accepted = asyncio.ensure_future(self.router.register(slot.info.url, START_TIMEOUT_S))
        end = asyncio.ensure_future(_result(slot.actor.wait_for_end.remote()))
        try:
            await asyncio.wait({accepted, end}, return_when=asyncio.FIRST_COMPLETED)
            if not accepted.done():
                raise ServerEndedError(end.result())
            accepted.result()
        finally:
            accepted.cancel()
            end.cancel()
        slot.registered = True

    async def _load(self, info: ServerInfo, version: int) -> None:
        held = await self._held_version(info)
        if self.load_weights is not None:
            await self.load_weights(info.url, version)
        elif held == FROM_DISK:  # nothing is trained: what was loaded is what is asked for
            await self._request(
                "POST", f"{info.url}/update_weight_version", {"new_version": str(version)}
            )
        held = await self._held_version(info)
        if held != str(version):
            raise ServerError(f"{info.url} holds weights {held}, version {version} is needed")

    async def _held_version(self, info: ServerInfo) -> str:
        return (await self._request("GET", f"{info.url}/model_info"))["weight_version"]

    async def _request(self, method: str, url: str, body: object = None) -> Any:
        async with self._session.request(method, url, json=body) as response:
            response.raise_for_status()
            return await response.json() if response.content_type == "application/json" else None


async def _result(reference: Any) -> Any:
    return await reference
