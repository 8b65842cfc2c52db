"""The sglang-router process, and which servers it knows."""

import asyncio
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import aiohttp

from rollflow.engines.platform import Device

from .ports import PortLease
from .process import OwnedProcess
from .server import POLL_S, ServerError, wait_until_up
from .server_args import router_arguments


async def wait_for_server(field: str, url: str, timeout_s: float) -> None:
    """Wait until a server that is not ours answers; ServerError names ``field`` and ``url``."""
    deadline = time.monotonic() + timeout_s
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(5)) as session:
        while True:
            try:
                async with session.get(f"{url.rstrip('/')}/health") as response:
                    if response.status == 200:
                        return
                    last = f"status {response.status}"
            except (aiohttp.ClientError, TimeoutError) as error:
                last = repr(error)
            if time.monotonic() > deadline:
                raise ServerError(
                    f"{field} = {url!r} did not answer /health within {timeout_s:.0f} s ({last}); "
                    "start that server, or give the URL of one that runs"
                )
            await asyncio.sleep(POLL_S)


class Router:
    """Spreads requests over the servers that are registered; ends with this process."""

    def __init__(
        self,
        table: Mapping[str, Any],
        log_dir: Path,
        device: Device,
        request_timeout_s: float,
        *,
        keyed: bool = False,
    ) -> None:
        self._leases = PortLease(), PortLease()
        port, metrics_port = (lease.port for lease in self._leases)
        self.url = f"http://127.0.0.1:{port}"
        arguments = router_arguments(
            table,
            port=port,
            metrics_port=metrics_port,
            timeout_s=request_timeout_s,
            keyed=keyed,
        )
        self._process = OwnedProcess("router", arguments, log_dir / "router.log", device)
        self._session = aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(30))

    @property
    def pid(self) -> int:
        """Leads the session of the router's processes."""
        return self._process.pid

    def check(self) -> None:
        """Raise ServerError when the router's process has ended."""
        if (code := self._process.exit_code) is not None:
            raise ServerError(
                f"router ended with exit code {code}; {self._process.log}:\n{self._process.tail()}"
            )

    async def wait_until_up(self, timeout_s: float) -> None:
        """Wait until the router answers; ServerError when it does not."""
        await wait_until_up("router", self._process, f"{self.url}/health", timeout_s)

    async def register(self, server_url: str, timeout_s: float) -> None:
        """Send requests to this server too; returns once the router found it healthy."""
        await self._request("POST", "/workers", json={"url": server_url})
        deadline = time.monotonic() + timeout_s
        while not any(w["is_healthy"] for w in await self._workers(server_url)):
            if time.monotonic() > deadline:
                raise ServerError(
                    f"router did not accept {server_url} within {timeout_s:.0f} s; "
                    f"{self._process.log}:\n{self._process.tail()}"
                )
            await asyncio.sleep(POLL_S)

    async def unregister(self, server_url: str) -> None:
        """Send nothing more to this server; fine when it is not registered."""
        for worker in await self._workers(server_url):
            await self._request("DELETE", f"/workers/{worker['id']}")

    async def stop(self) -> None:
        """End the router's process."""
        await self._session.close()
        self._process.kill()
        for lease in self._leases:
            lease.release()

    async def _workers(self, server_url: str) -> list[dict[str, Any]]:
        answer = await self._request("GET", "/workers")
        return [w for w in answer["workers"] if w["url"].rstrip("/") == server_url]

    async def _request(self, method: str, path: str, json: object = None) -> Any:
        self.check()
        async with self._session.request(method, self.url + path, json=json) as response:
            response.raise_for_status()
            return await response.json()
