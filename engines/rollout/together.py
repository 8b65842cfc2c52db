"""Requests that go to a server as one: those of a group that are sent at the same moment.

A server's one HTTP process takes about a millisecond for a request, and little more for one of eight
prompts. The answer comes when the last of them is there, which a group waits for anyway.
"""

import asyncio
from collections.abc import Awaitable, Callable, Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any

from . import group_seeds
from .answers import RequestRefusedError, ServerFaultError

Answer = dict[str, Any]
Send = Callable[[dict[str, Any], Mapping[str, str]], Awaitable[Any]]
"""Posts a body with headers; what is answered, in JSON."""


@dataclass(slots=True)
class _Joint:
    name: str
    headers: Mapping[str, str]
    bodies: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    answers: list[asyncio.Future[Answer]] = field(default_factory=list[asyncio.Future[Answer]])


class Together:
    """Gathers requests until the event loop has run all that was ready, and sends them.

    Only those with the same key, which differ in nothing but their prompts and seeds.
    """

    def __init__(self, send: Send) -> None:
        self._send = send
        self._gathering: dict[Hashable, _Joint] = {}
        self._sending: set[asyncio.Task[None]] = set()

    def add(
        self, key: Hashable, name: str, body: dict[str, Any], headers: Mapping[str, str]
    ) -> tuple[str, asyncio.Future[Answer]]:
        """(the id under which the server knows this request, its answer to be).

        ``name`` becomes the id of the whole where this is the first of ``key``.
        """
        loop = asyncio.get_running_loop()
        joint = self._gathering.get(key)
        if joint is None:
            joint = self._gathering[key] = _Joint(name, headers)
            loop.call_soon(self._begin, key)
        answer: asyncio.Future[Answer] = loop.create_future()
        request = f"{joint.name}_{len(joint.answers)}"  # as SGLang names the parts of a request
        joint.bodies.append(body)
        joint.answers.append(answer)
        return request, answer

    def _begin(self, key: Hashable) -> None:
        joint = self._gathering.pop(key)
        task = asyncio.ensure_future(self._ask(joint))
        self._sending.add(task)
        task.add_done_callback(self._sending.discard)

        def given_up(_: asyncio.Future[Answer]) -> None:
            if all(answer.cancelled() for answer in joint.answers):
                task.cancel()

        for answer in joint.answers:
            answer.add_done_callback(given_up)

    async def _ask(self, joint: _Joint) -> None:
        if len(joint.bodies) == 1:
            await self._ask_one(joint, 0)
            return
        whole = {**joint.bodies[0], "rid": joint.name}
        whole["input_ids"] = [body["input_ids"] for body in joint.bodies]
        seeds = [body["sampling_params"]["sampling_seed"] for body in joint.bodies]
        whole[group_seeds.FIELD] = group_seeds.labels_of(seeds)
        whole["sampling_params"] = {**whole["sampling_params"]}
        del whole["sampling_params"]["sampling_seed"]
        try:
            found = {a["meta_info"]["id"]: a for a in await self._send(whole, joint.headers)}
        except RequestRefusedError:  # which of them is refused shows where each is sent alone
            await asyncio.gather(*(self._ask_one(joint, i) for i in range(len(joint.bodies))))
            return
        except Exception as error:  # noqa: BLE001 - whoever waits for an answer is told
            for answer in joint.answers:
                _fail(answer, error)
            return
        for i, answer in enumerate(joint.answers):
            request = f"{joint.name}_{i}"
            if request not in found:
                _fail(answer, ServerFaultError(f"no answer to {request}"))
            elif not answer.done():
                answer.set_result(found[request])

    async def _ask_one(self, joint: _Joint, i: int) -> None:
        answer = joint.answers[i]
        try:
            found = await self._send({**joint.bodies[i], "rid": f"{joint.name}_{i}"}, joint.headers)
        except Exception as error:  # noqa: BLE001 - whoever waits for the answer is told
            _fail(answer, error)
            return
        if not answer.done():
            answer.set_result(found)


def _fail(answer: asyncio.Future[Answer], error: Exception) -> None:
    if not answer.done():
        answer.set_exception(error)
