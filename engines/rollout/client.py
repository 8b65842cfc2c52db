"""The one HTTP client for generation: token ids in, token ids and log-probabilities out."""

import asyncio
import itertools
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, TypeVar

import aiohttp
import orjson

from rollflow.engines.gpu.server_answers import OURS
from rollflow.engines.hooks import Completion

from .answers import RequestRefusedError, ServerFaultError, completion_of, joined
from .config import SamplingConfig
from .experts import ASKING
from .single_turn import DEFAULT_NEW_TOKENS
from .together import Together

T = TypeVar("T")
TRANSIENT = {408, 429}
FIRST_PAUSE_S = 0.2
STOP_TIMEOUT_S = 60.0
"""Seconds that servers may take to hand over what they were told to stop."""
POLL_S = 0.002
ABORT_AGAIN_S = 0.05
"""A request may still be on its way to its server when that is told to stop: it is told again."""
GIVE_UP_S = 15.0
"""Seconds after which a request that was told to stop is asked for anew, where servers may be silent
that are not ours."""


class GenerationError(RuntimeError):
    """A request still failed after every retry; the message has the last fault."""


Abort = Callable[[str | None], Awaitable[None]]
"""Have every server stop one request, by its id, or all of them (None)."""


class Weights(Protocol):
    """What is known of the weights that servers have."""

    def accepts(self, label: str) -> bool:
        """Whether an answer by the weights of that name may be used now."""
        ...

    async def look_again(self) -> None:
        """An answer was by other weights: find the server that gave it, and leave it out."""
        ...


@dataclass(slots=True)
class Scope:
    """The requests of one group: what can be cut off together."""

    cut: bool = False
    requests: set[str] = field(default_factory=set[str])
    """Ids of those that a server is working on."""


_scope: ContextVar[Scope | None] = ContextVar("scope", default=None)
_served: ContextVar[set[int] | None] = ContextVar("served", default=None)
_episode: ContextVar[str] = ContextVar("episode", default="")
ROUTING_KEY = "X-SMG-Routing-Key"
"""Header by which the router's policies with a key know what belongs together."""


@contextmanager
def requests_of(scope: Scope, served: set[int], episode_id: str = "") -> Iterator[None]:
    """Count the requests that are sent within to ``scope``, and what answers them to ``served``."""
    tokens = _scope.set(scope), _served.set(served), _episode.set(episode_id)
    try:
        yield
    finally:
        _scope.reset(tokens[0])
        _served.reset(tokens[1])
        _episode.reset(tokens[2])


class GenerateClient:
    """Sends requests to the router.

    ``wait_ready`` returns once a server can answer; it is asked before a request is sent again, so
    that a server's restart costs patience and not retries. Each sample keeps its own seed and retry,
    and has a request of its own but where :meth:`generate` is told otherwise.
    """

    def __init__(
        self,
        url: str,
        *,
        timeout_s: float,
        max_retries: int,
        wait_ready: Callable[[], Awaitable[None]],
        abort: Abort | None = None,
        weights: Weights | None = None,
        give_up_s: float = STOP_TIMEOUT_S,
        affinity: Literal["", "group", "episode"] = "",
    ) -> None:
        self._url = f"{url}/generate"
        self._max_retries = max_retries
        self._wait_ready = wait_ready
        self._abort = abort
        self._weights = weights
        self._give_up_s = give_up_s
        self._affinity = affinity
        self._open, self._calm = asyncio.Event(), asyncio.Event()
        """Set but while weights change, and but while requests are recalled."""
        self._open.set()
        self._calm.set()
        self._recall = asyncio.Lock()
        self._together = Together(self._post)
        self._posts: dict[str, asyncio.Future[dict[str, Any]]] = {}
        self._given_up: set[str] = set()
        self._stops = 0
        self._in_flight: set[str] = set()
        self._numbers = itertools.count()
        self._session = aiohttp.ClientSession(
            timeout=aiohttp.ClientTimeout(timeout_s), connector=aiohttp.TCPConnector(limit=0)
        )

    async def generate(
        self,
        input_ids: list[int],
        sampling: dict[str, Any],
        seed: int,
        *,
        routed_experts: bool = False,
        together: bool = False,
    ) -> Completion:
        """Continue ``input_ids``; HTTP and server faults are retried, with a bound.

        Where weights change meanwhile, the answer goes on under the new ones from its last token.
        ``sampling`` has SGLang's names. With ``routed_experts`` the answer has them, or is a fault.
        ``together``: it may go with others of its group in one request, to servers of ours.
        Raises RequestRefusedError or GenerationError.
        """
        scope = _scope.get() or Scope()
        served = _served.get()
        limit = int(sampling.get("max_new_tokens", DEFAULT_NEW_TOKENS))
        done = Completion([], [], "abort", 0)
        while True:
            await self._may_send()
            if scope.cut:
                return done
            stops = self._stops
            rest = {**sampling, "max_new_tokens": limit - len(done.token_ids)}
            body = {
                "input_ids": [*input_ids, *done.token_ids],
                "sampling_params": {**rest, "sampling_seed": seed},
                "return_logprob": True,
            }
            answer = await self._ask(
                body, scope, stops, routed_experts=routed_experts, together=together
            )
            if answer is None:
                continue
            done = joined(done, answer)
            if served is not None and answer.token_ids:
                served.add(answer.policy_version)
            if answer.finish_reason != "abort" or scope.cut:
                return done
            if len(done.token_ids) >= limit:
                return joined(done, Completion([], [], "length", done.policy_version))

    async def logprobs(self, prompt_ids: list[int], response_ids: list[int]) -> list[float]:
        """Log-probability (nats) of each response token under the servers' weights, at temperature 1.

        Raises RequestRefusedError or GenerationError.
        """
        body = {
            "input_ids": [*prompt_ids, *response_ids],
            "sampling_params": {"max_new_tokens": 0, "temperature": 1.0},
            "return_logprob": True,
            "logprob_start_len": len(prompt_ids) - 1,
        }

        def read(answer: dict[str, Any], seconds: float) -> list[float]:
            entries = answer["meta_info"]["input_token_logprobs"][-len(response_ids) :]
            told = [entry[1] for entry in entries]
            # SGLang tells the vocabulary's last id as 0; the probability is that of the id asked for.
            if len(told) < len(response_ids) or any(
                said not in (asked, 0) for said, asked in zip(told, response_ids, strict=True)
            ):
                raise ServerFaultError(f"log-probabilities of other tokens: {entries!r:.200}")
            return [float(entry[0]) for entry in entries]

        return await self._tried(body, Scope(), read)

    async def hold(self) -> None:
        """Send nothing more, and have servers hand over what they are at, e.g. for new weights.

        GenerationError where some request does not come back.
        """
        self._open.clear()
        self._stops += 1
        await self._stop(self._in_flight, None)

    def release(self) -> None:
        """Send on, from where each answer stands."""
        self._open.set()

    async def recall(self) -> None:
        """Have servers hand over what they are at, and send it on to those that are left.

        What does not come back within ``give_up_s`` seconds is asked for anew.
        """
        async with self._recall:
            self._calm.clear()
            self._stops += 1
            try:
                await self._stop(self._in_flight, None)
            finally:
                self._calm.set()

    async def cut(self, scope: Scope) -> None:
        """Cut the requests of ``scope`` off: each answers with what it has, as ``abort``.

        GenerationError where some request does not come back.
        """
        scope.cut = True
        await self._stop(scope.requests, scope.requests)

    async def close(self) -> None:
        """Close the kept connections."""
        await self._session.close()

    async def _stop(self, waited_for: set[str], named: set[str] | None) -> None:
        started = time.monotonic()
        while waited_for:
            if time.monotonic() > started + self._give_up_s:
                self._give_up(waited_for)
            if time.monotonic() > started + STOP_TIMEOUT_S:
                raise GenerationError(
                    f"{self._url}: {len(waited_for)} requests did not stop within "
                    f"{STOP_TIMEOUT_S:.0f} s, first {min(waited_for)}"
                )
            if self._abort is not None:
                ids = [None] if named is None else list(named)
                await asyncio.gather(*(self._abort(request) for request in ids))
            again = time.monotonic() + ABORT_AGAIN_S
            while waited_for and time.monotonic() < again:
                await asyncio.sleep(POLL_S)

    def _give_up(self, requests: set[str]) -> None:
        """Wait no longer for requests that silent servers hold."""
        for request in requests & self._posts.keys():
            self._given_up.add(request)
            self._posts[request].cancel()

    async def _may_send(self) -> None:
        while not (self._open.is_set() and self._calm.is_set()):
            await self._open.wait()
            await self._calm.wait()

    async def _ask(
        self,
        body: dict[str, Any],
        scope: Scope,
        stops: int,
        *,
        routed_experts: bool,
        together: bool,
    ) -> Completion | None:
        """One request; None where it was given up."""

        def read(answer: dict[str, Any], seconds: float) -> Completion:
            asked = len(body["input_ids"]) if routed_experts else None
            completion = completion_of(answer, seconds, asked)
            if completion.finish_reason == "abort" and stops == self._stops and not scope.cut:
                reason = answer["meta_info"]["finish_reason"]
                raise ServerFaultError(f"aborted: {reason}")
            return completion

        prefix = ASKING if routed_experts else OURS
        try:
            return await self._tried(body, scope, read, prefix, together=together)
        except _GivenUpError:
            return None

    async def _tried(
        self,
        body: dict[str, Any],
        scope: Scope,
        read: Callable[[dict[str, Any], float], T],
        prefix: str = OURS,
        *,
        together: bool = False,
    ) -> T:
        """Send a request until ``read`` accepts its answer, with a bound."""
        started = time.monotonic()
        for attempt in range(self._max_retries + 1):
            # A key leads to one server, even a dead one until the router forgets it.
            headers = self._headers() if attempt == 0 else {}
            # With a dot at its end none begins another: SGLang stops all that begin with what it is told.
            name = f"{prefix}{next(self._numbers)}."
            request, post = self._sent(
                name, body, headers, scope if together and not attempt else None
            )
            scope.requests.add(request)
            self._in_flight.add(request)
            try:
                answer = await self._answer(request, post)
                return read(answer, time.monotonic() - started)
            except (aiohttp.ClientError, TimeoutError, ServerFaultError) as error:
                if attempt == self._max_retries:
                    raise GenerationError(
                        f"{self._url}: {attempt + 1} attempts failed, last: {error!r}"
                    ) from error
            finally:
                scope.requests.discard(request)
                self._in_flight.discard(request)
            await asyncio.sleep(FIRST_PAUSE_S * 2**attempt)
            await self._wait_ready()
            await self._may_send()
        raise AssertionError("unreachable")

    def _sent(
        self, name: str, body: dict[str, Any], headers: dict[str, str], group: Scope | None
    ) -> tuple[str, asyncio.Future[dict[str, Any]]]:
        """(id of the request, its answer to be); with others of its ``group`` where there is one."""
        if group is None:
            return name, asyncio.ensure_future(self._post({**body, "rid": name}, headers))
        prefix = name.rpartition("-")[0]
        sampling = {k: v for k, v in body["sampling_params"].items() if k != "sampling_seed"}
        key = (id(group), prefix, orjson.dumps([sampling, headers]))
        return self._together.add(key, name, body, headers)

    async def _answer(self, request: str, post: asyncio.Future[dict[str, Any]]) -> dict[str, Any]:
        """The answer, if it is by weights that count; _GivenUpError once it is waited for no more."""
        self._posts[request] = post
        try:
            answer = await post
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if request not in self._given_up or (task and task.cancelling()):
                raise
            raise _GivenUpError from None
        finally:
            self._given_up.discard(request)
            del self._posts[request]
        label = str(answer["meta_info"].get("weight_version"))
        if self._weights and not self._weights.accepts(label):
            await self._weights.look_again()
            raise ServerFaultError(f"an answer by other weights ({label!r}) than those served now")
        return answer

    def _headers(self) -> dict[str, str]:
        """What the router finds the same server by."""
        episode = _episode.get()
        if not (self._affinity and episode):
            return {}
        key = episode if self._affinity == "episode" else episode.rpartition("#")[0]
        return {ROUTING_KEY: key}

    async def _post(self, body: dict[str, Any], headers: Mapping[str, str]) -> Any:
        async with self._session.post(self._url, json=body, headers=headers) as response:
            if response.status >= 500 or response.status in TRANSIENT:
                raise ServerFaultError(f"status {response.status}: {await response.text()}")
            if response.status >= 400:
                raise RequestRefusedError(
                    f"{self._url}: status {response.status}: {await response.text()}"
                )
            return orjson.loads(await response.read())


class _GivenUpError(Exception):
    """A request that a silent server holds is waited for no longer."""


def sampling_params(config: SamplingConfig) -> dict[str, Any]:
    """SGLang's sampling parameters, without the lists that are empty."""
    return {k: v for k, v in config.model_dump().items() if v != []}
