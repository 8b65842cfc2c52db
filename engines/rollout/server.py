"""One SGLang server and the Ray actor that owns its process."""

import asyncio
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp

from rollflow.engines.config import ModelConfig
from rollflow.engines.platform import Device

from . import forked
from .ports import PortLease
from .process import OwnedProcess
from .server_args import server_arguments

POLL_S = 0.1


class ServerError(RuntimeError):
    """An SGLang server did not start, ended or fell silent; the message has its log's last lines."""


class ServerEndedError(ServerError):
    """A server that had started ended."""


@dataclass(frozen=True, slots=True)
class ServerInfo:
    """A server that answers, e.g. ``ServerInfo("http://127.0.0.1:21144", 4242, 21144)``."""

    url: str
    pid: int
    """Leads the session of all the server's processes; killing it ends them."""
    port: int


@dataclass(frozen=True, slots=True)
class RolloutInfo:
    """What runs, e.g. for a log line; empty lists where the run has no servers."""

    router_url: str
    server_urls: list[str]
    pids: list[int]
    """Session leaders of the servers, then of the router."""
    manager_pid: int
    notices: list[str] = field(default_factory=list[str])
    """What befell servers of somebody else at the start; later :meth:`RolloutManager.release` tells."""


class ServerActor:
    """Owns one server: the server ends when this actor does, however that happens."""

    def __init__(self, name: str, log_dir: str, device: Device) -> None:
        self.name = name
        self.log = Path(log_dir) / f"{name}.log"
        self.device: Device = device
        forked.hold()  # a server that dies has a successor
        self._process: OwnedProcess | None = None
        self._lease: PortLease | None = None

    async def start(
        self, model: ModelConfig, table: Mapping[str, Any], seed: int, timeout_s: float
    ) -> ServerInfo:
        """Start the server and wait until it answers.

        ``table`` is the user's ``[sglang]`` table. Raises ServerError when the process ends or
        ``timeout_s`` seconds pass before that.
        """
        self.stop()
        self._lease = PortLease()
        port = self._lease.port
        arguments = server_arguments(model, table, self.device, port=port, seed=seed)
        self._process = OwnedProcess("server", arguments, self.log, self.device)
        url = f"http://127.0.0.1:{port}"
        await wait_until_up(self.name, self._process, f"{url}/model_info", timeout_s)
        return ServerInfo(url, self._process.pid, port)

    async def wait_for_end(self) -> str:
        """Return once the process has ended, with its exit code and its log's last lines."""
        assert self._process is not None
        while (code := self._process.exit_code) is None:
            await asyncio.sleep(POLL_S)
        return (
            f"server {self.name} ended with exit code {code}; {self.log}:\n{self._process.tail()}"
        )

    def stop(self) -> None:
        """End the server's processes; fine when they are gone already."""
        if self._process is not None:
            self._process.kill()
            self._process = None
        if self._lease is not None:
            self._lease.release()
            self._lease = None


async def wait_until_up(name: str, process: OwnedProcess, url: str, timeout_s: float) -> None:
    """Wait until GET ``url`` gives status 200; ServerError names ``name`` when that cannot be."""
    deadline = time.monotonic() + timeout_s
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(5)) as session:
        while True:
            if process.exit_code is not None:
                what = f"ended with exit code {process.exit_code} while starting"
            elif time.monotonic() > deadline:
                what = f"did not answer {url} within {timeout_s:.0f} s"
            elif await _answers(session, url):
                return
            else:
                await asyncio.sleep(POLL_S)
                continue
            raise ServerError(f"{name} {what}; {process.log}:\n{process.tail()}")


async def _answers(session: aiohttp.ClientSession, url: str) -> bool:
    try:
        async with session.get(url) as response:
            return response.status == 200
    except (aiohttp.ClientError, TimeoutError):
        return False
