"""A server of somebody else, in front of a real one, that misbehaves when it is told to; and a fleet
that uses such servers."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import aiohttp
from aiohttp import web
from rollout_parts import RolloutParts, sample_of

from rollflow.engines.config import ModelConfig
from rollflow.engines.published import place_of, publish_files
from rollflow.engines.rollout.client import GenerateClient
from rollflow.engines.rollout.config import RolloutConfig
from rollflow.engines.rollout.config_servers import ExternalConfig
from rollflow.engines.rollout.external import Externals
from rollflow.engines.rollout.fleet import Fleet
from rollflow.storage.refs import RunRef
from rollflow.storage.samples import Sample

HELD = {"Content-Length", "Transfer-Encoding", "Host", "Connection"}


class Engine:
    """Passes requests on to the SGLang server at ``behind``, or does what ``mood`` says.

    ``well``; ``silent``: neither answers nor lets go of what it was asked; ``without``: has no
    endpoint ``lacks``. :meth:`die` closes the port, :meth:`live` opens it again.
    """

    def __init__(self, behind: str) -> None:
        self.behind, self.mood, self.lacks = behind, "well", ""
        self.asked: list[str] = []
        self.prompts: set[tuple[int, ...]] = set()
        """Token ids of what it was asked to continue."""
        self._port = 0
        self._well = asyncio.Event()
        self._changed = asyncio.Event()
        self._session = aiohttp.ClientSession()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    async def live(self) -> None:
        app = web.Application(client_max_size=1 << 28)
        app.router.add_route("*", "/{path:.*}", self._pass_on)
        self._runner = web.AppRunner(app, shutdown_timeout=0.1)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", self._port, reuse_address=True)
        await site.start()
        self._port = self._runner.addresses[0][1]

    async def die(self) -> None:
        await self._runner.cleanup()

    async def fall_silent(self) -> None:
        self.mood = "silent"
        self._changed.set()

    async def recover(self) -> None:
        self.mood = "well"
        self._changed.clear()

    async def stop(self) -> None:
        with contextlib.suppress(Exception):
            await self._runner.cleanup()
        await self._session.close()

    def answers(self, path: str) -> int:
        return self.asked.count(path)

    async def _pass_on(self, request: web.Request) -> web.Response:
        self.asked.append(request.path)
        if request.path == "/generate":
            self.prompts.add(tuple((await request.json())["input_ids"]))
        if self.lacks and request.path == self.lacks:
            return web.Response(status=404)
        forward = asyncio.create_task(self._forward(request))
        silence = asyncio.create_task(self._changed.wait())
        try:
            await asyncio.wait({forward, silence}, return_when=asyncio.FIRST_COMPLETED)
            if self._changed.is_set():
                await asyncio.get_running_loop().create_future()
            return await forward
        finally:
            silence.cancel()
            forward.cancel()

    async def _forward(self, request: web.Request) -> web.Response:
        headers = {k: v for k, v in request.headers.items() if k not in HELD}
        async with self._session.request(
            request.method, self.behind + request.path, data=await request.read(), headers=headers
        ) as answer:
            return web.Response(
                body=await answer.read(),
                status=answer.status,
                content_type=answer.content_type,
            )


@asynccontextmanager
async def attached(
    rollout: RolloutParts, engines: list[Engine], folder: Path, **settings: Any
) -> AsyncIterator[tuple[Fleet, Externals, GenerateClient]]:
    """A fleet without a server of its own, whose trainer has the second model's weights."""
    config = RolloutConfig(
        servers=0,
        external=ExternalConfig(
            urls=[e.url for e in engines],
            weights=str(folder / "weights"),
            **{"health_every_s": 0.1, "slow_s": 5.0, "timeout_s": 30.0, **settings},
        ),
        reward="rollout_parts:length",
    )
    run = RunRef("elsewhere", str(folder / "run"))
    model = ModelConfig(path=str(rollout.models[0]))
    fleet = Fleet(model, config, {}, {}, "cpu", folder / "logs", run=run)
    place = place_of(str(folder / "weights"), run)

    async def publish(version: int) -> None:
        await asyncio.to_thread(publish_files, place, version, rollout.models[1], "float32")

    assert fleet.external
    fleet.external.publish = publish
    client = GenerateClient(
        fleet.router.url, timeout_s=60, max_retries=4, wait_ready=fleet.wait_ready,
        abort=fleet.abort, weights=fleet, give_up_s=0.5,
    )  # fmt: skip
    fleet.recall = client.recall
    try:
        await fleet.start()
        yield fleet, fleet.external, client
    finally:
        await client.close()
        await fleet.stop()
    assert not Path(place).exists()


async def answers(client: GenerateClient, n: int, tokens: int) -> list[Sample]:
    """``n`` samples of one prompt, each of so many tokens, all by version 1."""
    sampling = {"temperature": 1.0, "max_new_tokens": tokens, "ignore_eos": True}
    prompt = [4, 5, 12, 4, 6, 13]
    done = await asyncio.gather(*(client.generate(prompt, sampling, seed) for seed in range(n)))
    assert [len(c.token_ids) for c in done] == [tokens] * n
    assert {v for c in done for v in c.policy_versions} == {1}
    return [
        replace(sample_of(c.token_ids, c.logprobs), index=i, finish_reason="length")
        for i, c in enumerate(done)
    ]


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(60):
        while not condition():
            await asyncio.sleep(0.02)
