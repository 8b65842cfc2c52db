"""The one HTTP client for generation: token ids in, token ids and log-probabilities out."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any

import aiohttp

from rollflow.engines.hooks import Completion

from .config import SamplingConfig

TRANSIENT = {408, 429}
FIRST_PAUSE_S = 0.2


class RequestRefusedError(ValueError):
    """The server will never accept this request, e.g. a prompt longer than the context."""


class GenerationError(RuntimeError):
    """A request still failed after every retry; the message has the last fault."""


class GenerateClient:
    """Sends requests to the router.

    ``wait_ready`` returns once a server can answer; it is asked before a request is sent again, so
    that a server's restart costs patience and not retries. One request per sample over kept
    connections is the fastest way that was measured, and each sample keeps its own seed and retry.
    """

    def __init__(
        self,
        url: str,
        *,
        timeout_s: float,
        max_retries: int,
        wait_ready: Callable[[], Awaitable[None]],
    ) -> None:
        self._url = f"{url}/generate"
        self._max_retries = max_retries
        self._wait_ready = wait_ready
        self._session = aiohttp.ClientSession(
            timeout=aiohttp.ClientTimeout(timeout_s), connector=aiohttp.TCPConnector(limit=0)
        )

    async def generate(
        self, input_ids: list[int], sampling: dict[str, Any], seed: int
    ) -> Completion:
        """Continue ``input_ids``; HTTP and server faults are retried, with a bound.

        ``sampling`` has SGLang's names. Raises RequestRefusedError or GenerationError.
        """
        body = {
            "input_ids": input_ids,
            "sampling_params": {**sampling, "sampling_seed": seed},
            "return_logprob": True,
        }
        started = time.monotonic()
        for attempt in range(self._max_retries + 1):
            try:
                answer = await self._post(body)
            except (aiohttp.ClientError, TimeoutError, _ServerFaultError) as error:
                if attempt == self._max_retries:
                    raise GenerationError(
                        f"{self._url}: {attempt + 1} attempts failed, last: {error!r}"
                    ) from error
                await asyncio.sleep(FIRST_PAUSE_S * 2**attempt)
                await self._wait_ready()
            else:
                return _completion(answer, time.monotonic() - started)
        raise AssertionError("unreachable")

    async def close(self) -> None:
        """Close the kept connections."""
        await self._session.close()

    async def _post(self, body: dict[str, Any]) -> dict[str, Any]:
        async with self._session.post(self._url, json=body) as response:
            if response.status >= 500 or response.status in TRANSIENT:
                raise _ServerFaultError(f"status {response.status}: {await response.text()}")
            if response.status >= 400:
                raise RequestRefusedError(
                    f"{self._url}: status {response.status}: {await response.text()}"
                )
            answer = await response.json()
        if answer["meta_info"]["finish_reason"]["type"] == "abort":
            raise _ServerFaultError(f"aborted: {answer['meta_info']['finish_reason']}")
        return answer


class _ServerFaultError(Exception):
    """An answer that another attempt may better."""


def sampling_params(config: SamplingConfig) -> dict[str, Any]:
    """SGLang's sampling parameters, without the lists that are empty."""
    return {k: v for k, v in config.model_dump().items() if v != []}


def _completion(answer: dict[str, Any], seconds: float) -> Completion:
    meta = answer["meta_info"]
    return Completion(
        token_ids=answer["output_ids"],
        logprobs=[entry[0] for entry in meta["output_token_logprobs"]],
        finish_reason=meta["finish_reason"]["type"],
        policy_version=int(meta["weight_version"]),
        cached_tokens=meta["cached_tokens"],
        seconds=seconds,
    )
