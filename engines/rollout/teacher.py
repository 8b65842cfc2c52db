"""A frozen teacher: how probable it finds each token that the policy sampled."""

import asyncio
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from rollflow.engines.config import ModelConfig
from rollflow.engines.platform import Device
from rollflow.storage.samples import TEACHER_LOGPROBS, Sample

from .client import GenerateClient
from .config import RolloutConfig, TeacherConfig
from .fleet import Fleet
from .router import wait_for_server

VERSION = 0
"""The only version of weights that it ever has."""


class Teacher:
    """Scores samples by the servers of ``rollout.teacher``: its own, or some that run elsewhere."""

    def __init__(
        self,
        config: TeacherConfig,
        rollout: RolloutConfig,
        policy: ModelConfig,
        router: Mapping[str, Any],
        device: Device,
        log_dir: Path,
    ) -> None:
        self._config, self._rollout = config, rollout
        self._model = policy.model_copy(update={"path": config.path, "random_weights": False})
        self._router, self._log_dir = router, log_dir / "teacher"
        self._device: Device = device
        self._running = AsyncExitStack()
        self._client: GenerateClient | None = None

    async def start(self) -> None:
        """Start its servers, or find those at ``url``; ServerError when they do not answer."""
        url, wait_ready = self._config.url.rstrip("/"), self._wait_ready
        if url:
            await wait_ready()
        else:
            servers = self._rollout.model_copy(update={"servers": self._config.servers})
            fleet = Fleet(
                self._model,
                servers,
                self._config.sglang,
                self._router,
                self._device,
                self._log_dir,
            )
            self._running.push_async_callback(fleet.stop)
            await fleet.start()
            await self._running.enter_async_context(fleet.serving(VERSION))
            url, wait_ready = fleet.router.url, fleet.wait_ready
        self._client = GenerateClient(
            url,
            timeout_s=self._rollout.request_timeout_s,
            max_retries=self._rollout.max_retries,
            wait_ready=wait_ready,
        )
        self._running.push_async_callback(self._client.close)

    async def annotate(self, samples: Sequence[Sample]) -> list[Sample]:
        """The samples, each with the teacher's log-probability (nats) of each response token in
        its metadata under ``TEACHER_LOGPROBS``.

        Raises:
            GenerationError: the teacher's servers did not answer after every retry.
        """
        return await asyncio.gather(*(self._annotated(sample) for sample in samples))

    async def stop(self) -> None:
        """End the servers that it started."""
        await self._running.aclose()
        self._client = None

    async def _annotated(self, sample: Sample) -> Sample:
        assert self._client is not None
        found: list[float] = []
        if sample.response_ids:
            found = await self._client.logprobs(sample.prompt_ids, sample.response_ids)
        return replace(sample, metadata={**sample.metadata, TEACHER_LOGPROBS: found})

    async def _wait_ready(self) -> None:
        await wait_for_server(
            "rollout.teacher.url", self._config.url, self._rollout.request_timeout_s
        )
