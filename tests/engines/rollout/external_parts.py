"""A server of somebody else, in front of a real one, that misbehaves when it is told to."""

import asyncio
import contextlib

import aiohttp
from aiohttp import web

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
