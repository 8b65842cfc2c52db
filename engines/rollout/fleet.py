"""The servers behind the router: started together, watched, and replaced when they die.

A server receives requests only while it is known to hold the weights of the step: it is *admitted*
after its version was read back, and a server that was started again is given the weights first.
Servers that somebody else runs (:mod:`.external`) stand beside ours.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import ray
from ray.exceptions import RayActorError, RayError

from rollflow.engines.cluster import DeadlineError
from rollflow.engines.config import ModelConfig
from rollflow.engines.placement import on_this_machine
from rollflow.engines.platform import SHARE, Device
from rollflow.engines.published import place_of
from rollflow.storage.refs import RunRef

from .config import RolloutConfig
from .external import Externals
from .router import Router
from .server import POLL_S, ServerActor, ServerEndedError, ServerError, ServerInfo
from .server_args import (
    deterministic_arguments,
    gpus_per_server,
    shared_gpu_arguments,
)
from .slot import Slot, send
from .turns import Turns

LoadWeights = Callable[[str, int], Awaitable[str]]
"""Brings the weights of a version to the server at a URL. RayError where they are gone: the trainer
has newer ones by now."""

START_TIMEOUT_S = 600.0
MAX_RESTARTS = 3
"""Times that one server is started again within one step."""
HEALTH_EVERY_S = 20.0
SILENT_AFTER = 3
"""Health checks in a row that a server may leave unanswered."""
ABORT_TIMEOUT_S = 2.0
FROM_DISK = "default"
"""What SGLang calls the version of weights that it loaded itself."""


class Fleet:
    """``rollout.servers`` SGLang servers, those of groups and of others, and their router.

    ``run``: whose weights servers of others are given.
    """

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
        run: RunRef | None = None,
    ) -> None:
        self._model = model
        fixed = deterministic_arguments(device) if rollout.deterministic else {}
        shared = shared_gpu_arguments() if shares_gpu else {}
        self._sglang = {**fixed, **shared, **sglang}
        tables = rollout.tables(self._sglang)
        self._shares_gpu = shares_gpu
        self._device: Device = device
        self._log_dir = log_dir
        self._seed = rollout.seed
        self._exact = rollout.deterministic
        """Which weights answer a request may not depend on when a server came back."""
        self._slots = [Slot(i, name, table) for i, (name, table) in enumerate(tables)]
        self._version: int | None = None
        self._users = 0
        self.router = Router(
            router, log_dir, device, rollout.request_timeout_s, keyed=bool(rollout.affinity)
        )
        self._session = aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(60))
        self.turns = Turns(self._session, self._slots)
        self.load_weights: LoadWeights | None = None
        self.recall: Callable[[], Coroutine[Any, Any, None]] | None = None
        """Has requests that a server may still hold answered by others."""
        self._spares = 0
        """Servers of ours that may be started in place of others' yet."""
        self._background: set[asyncio.Task[None]] = set()
        self.external: Externals | None = None
        if (others := rollout.external) and run:
            place = place_of(others.weights, run)
            self.external = Externals(others, model, place, self.router, self._make_up_for)
            self._spares = others.spares

    async def start(self) -> None:
        """Start router and servers at once, and wait for those of others.

        ServerError names the one of ours that does not come up. ValueError: see ``Externals``.
        """
        ours, alone = list(self._slots), not self._slots and not self._spares
        await asyncio.gather(
            self.router.wait_until_up(START_TIMEOUT_S),
            *(self._bring_up(slot) for slot in ours),
            *([self.external.start(alone=alone)] if self.external else []),
        )
        await asyncio.gather(*(self._register(slot) for slot in ours))
        for slot in ours:
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
            await self._admit_all(version)
            yield
        finally:
            self._users -= 1
            if not self._users:
                self._version = None
                if self.external:
                    self.external.withdraw()
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
        await self._admit_all(version)

    def accepts(self, label: str) -> bool:
        """Whether an answer by the weights that a server calls ``label`` may be used now."""
        theirs = self.external.label if self.external else ""
        return self._version is None or label in (str(self._version), theirs)

    async def look_again(self) -> None:
        """An answer was by other weights: leave the server of others that gave it out."""
        if self.external:
            await self.external.look_again()

    async def abort(self, request: str | None) -> None:
        """Have every server that is up stop a request, or all; one that does not answer is over
        anyhow."""
        body = {"abort_all": True} if request is None else {"rid": request}
        urls = [f"{slot.info.url}/abort_request" for slot in self._slots if slot.info]
        theirs = [self.external.abort(body, ABORT_TIMEOUT_S)] if self.external else []
        await asyncio.gather(
            *(self._request("POST", url, body) for url in urls), *theirs, return_exceptions=True
        )

    async def wait_ready(self) -> None:
        """Wait until a server can answer; ServerError when one was given up or the router ended."""
        self._check()
        while not any(slot.admitted for slot in self._slots) and not (
            self.external and self.external.ready
        ):
            await asyncio.sleep(POLL_S)
            self._check()

    async def stop(self) -> None:
        """End everything that was started."""
        tasks = [t for slot in self._slots for t in (slot.watcher, slot.admission) if t]
        tasks += self._background
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        actors = [slot.actor for slot in self._slots if slot.actor]
        await asyncio.gather(*(a.stop.remote() for a in actors), return_exceptions=True)
        for actor in actors:
            ray.kill(actor)
        if self.external:
            await self.external.stop()
        await self.router.stop()
        await self._session.close()

    def _check(self) -> None:
        self.router.check()
        for slot in self._slots:
            if slot.error:
                raise slot.error
        if self.external and not self._slots:
            self.external.check()

    async def _admit_all(self, version: int) -> None:
        theirs = [self.external.admit(version)] if self.external else []
        await asyncio.gather(*(self._admit_when_up(s) for s in self._slots if s.info), *theirs)
        await self.wait_ready()

    def _make_up_for(self, holds_requests: bool) -> None:
        """A server of others was left out: send its requests on, and start one of ours if we may."""
        works: list[Coroutine[Any, Any, None]] = []
        if holds_requests and self.recall and self._version is not None:
            works.append(self.recall())
        if self._spares:
            self._spares -= 1
            number = len(self._slots)
            self._slots.append(spare := Slot(number, f"spare-{number}", self._sglang))
            works.append(self._start_spare(spare))
        for work in works:
            task = asyncio.create_task(work)
            self._background.add(task)
            task.add_done_callback(self._background.discard)

    async def _start_spare(self, slot: Slot) -> None:
        """Start a server in place of another's; it stays. One that does not start is of no use."""
        assert self.external is not None
        try:
            await self._bring_up(slot)
            if self._version is not None:
                slot.admission = asyncio.create_task(self._admit_again(slot))
            slot.watcher = asyncio.create_task(self._keep(slot))
            self.external.notices.append(f"{slot.name} of our own was started in its place")
        except (ServerError, RayError, aiohttp.ClientError, TimeoutError) as error:
            self._slots.remove(slot)
            self.external.notices.append(f"{slot.name} did not start in its place: {error}")

    async def _bring_up(self, slot: Slot) -> None:
        if slot.actor is None:
            slot.actor = self._new_actor(slot)
        seed = self._seed * len(self._slots) + slot.index + 1
        info = await slot.actor.start.remote(self._model, slot.table, seed, START_TIMEOUT_S)
        await self._request("POST", f"{info.url}/freeze_gc")  # a full collection takes 0.3 s
        slot.info, slot.asleep = info, set()

    def _new_actor(self, slot: Slot) -> Any:
        gpus = gpus_per_server(slot.table, self._device)
        gpus = SHARE * gpus if self._shares_gpu else gpus
        # One that shares a GPU is captured by the trainer's place, which is on this machine.
        place = None if self._shares_gpu else on_this_machine()
        actor = ray.remote(ServerActor).options(
            num_cpus=0, num_gpus=gpus, max_concurrency=8, scheduling_strategy=place
        )
        return actor.remote(slot.name, str(self._log_dir), self._device)

    async def _keep(self, slot: Slot) -> None:
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

    async def _admit_again(self, slot: Slot) -> None:
        try:
            await self._admit_when_up(slot)
        except (ServerError, aiohttp.ClientError, TimeoutError) as error:
            slot.error = error

    async def _end_of(self, slot: Slot) -> str:
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

    async def _when_up(self, slot: Slot) -> ServerInfo:
        while slot.info is None:
            self._check()
            await asyncio.sleep(POLL_S)
        return slot.info

    async def _admit_when_up(self, slot: Slot) -> None:
        while not slot.admitted:
            info = await self._when_up(slot)
            try:
                await self._admit(slot, info)
            except (aiohttp.ClientError, TimeoutError, ServerEndedError):
                await asyncio.sleep(POLL_S)  # it has just died: the watcher starts it again
            except (RayError, DeadlineError) as error:
                if self._exact or isinstance(error, (RayActorError, DeadlineError)):
                    *_, why = ["", *str(error).strip().splitlines()]
                    message = f"{info.url} cannot get version {self._version} of the trainer: {why}"
                    raise ServerError(message) from error
                await asyncio.sleep(POLL_S)  # the trainer is ahead: its weights come to all soon
            self._check()
            if self._version is None:
                return

    async def _admit(self, slot: Slot, info: ServerInfo) -> None:
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

    async def _register(self, slot: Slot) -> None:
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
        held, failed = await self._held_version(info), ""
        if self.load_weights is not None:
            failed = await self.load_weights(info.url, version)
        elif held == FROM_DISK:  # nothing is trained: what was loaded is what is asked for
            await self._request(
                "POST", f"{info.url}/update_weight_version", {"new_version": str(version)}
            )
        held = await self._held_version(info)
        if held != str(version):
            wanted = f"version {version} is needed" + (f": {failed}" if failed else "")
            raise ServerError(f"{info.url} holds weights {held}, {wanted}")

    async def _held_version(self, info: ServerInfo) -> str:
        return (await self._request("GET", f"{info.url}/model_info"))["weight_version"]

    async def _request(self, method: str, url: str, body: object = None) -> Any:
        return await send(self._session, method, url, body)


async def _result(reference: Any) -> Any:
    return await reference
