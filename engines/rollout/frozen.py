"""A frozen model beside the policy: on servers of its own, or on some that run elsewhere."""

from collections.abc import Mapping
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

from rollflow.engines.config import ModelConfig
from rollflow.engines.platform import Device

from .client import GenerateClient
from .config import RolloutConfig
from .config_servers import FrozenConfig
from .fleet import Fleet
from .router import wait_for_server

VERSION = 0
"""The only version of weights that it ever has."""


class Frozen:
    """The servers of ``rollout.{name}``."""

    def __init__(
        self,
        name: str,
        config: FrozenConfig,
        rollout: RolloutConfig,
        policy: ModelConfig,
        router: Mapping[str, Any],
        device: Device,
        log_dir: Path,
    ) -> None:
        self._name, self._config, self._rollout = name, config, rollout
        self._model = policy.model_copy(update={"path": config.path, "random_weights": False})
        self._router, self._log_dir = router, log_dir / name
        self._device: Device = device
        self._running = AsyncExitStack()
        self._client: GenerateClient | None = None
        self._wait = self._wait_for_url
        self.url = config.url.rstrip("/")
        """Where it answers, once it has started."""

    async def start(self) -> None:
        """Start its servers, or find those at ``url``; ServerError when they do not answer."""
        if self.url:
            await self._wait()
            return
        alone = {"servers": self._config.servers, "groups": [], "external": None, "affinity": ""}
        fleet = Fleet(
            self._model,
            self._rollout.model_copy(update=alone),
            self._config.sglang,
            self._router,
            self._device,
            self._log_dir,
        )
        self._running.push_async_callback(fleet.stop)
        await fleet.start()
        await self._running.enter_async_context(fleet.serving(VERSION))
        self.url, self._wait = fleet.router.url, fleet.wait_ready

    @property
    def client(self) -> GenerateClient:
        """Asks its servers; closed when they are stopped. For use on the loop that started them."""
        if self._client is None:
            self._client = GenerateClient(
                self.url,
                timeout_s=self._rollout.request_timeout_s,
                max_retries=self._rollout.max_retries,
                wait_ready=self._wait,
            )
            self._running.push_async_callback(self._client.close)
        return self._client

    async def stop(self) -> None:
        """End the servers that it started."""
        await self._running.aclose()

    async def _wait_for_url(self) -> None:
        await wait_for_server(
            f"rollout.{self._name}.url", self._config.url, self._rollout.request_timeout_s
        )
