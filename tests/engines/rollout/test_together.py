"""Requests of a group that go to a server as one: each gets its own answer, or its own fault."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
from aiohttp import web

from rollflow.engines.rollout import client as client_module
from rollflow.engines.rollout.client import (
    GenerateClient,
    GenerationError,
    RequestRefusedError,
    Scope,
    requests_of,
)
from rollflow.engines.rollout.group_seeds import seeds_of

REFUSED = 666
"""A prompt that no server takes."""


def answer(request: str, ids: list[int], reason: str = "stop") -> dict[str, Any]:
    """A server that says its prompt again."""
    meta = {
        "id": request,
        "finish_reason": {"type": reason},
        "weight_version": "7",
        "output_token_logprobs": [[-0.5, token, None] for token in ids],
    }
    return {"output_ids": ids, "meta_info": meta}


class Server:
    """Answers one prompt or several in SGLang's way; some of its answers may be spoiled."""

    def __init__(self) -> None:
        self.bodies: list[dict[str, Any]] = []
        self.faults = 0
        """Requests that are refused for now."""
        self.lost: set[str] = set()
        """Ids that are left out of an answer."""
        self.cut: set[str] = set()
        """Ids whose answer is cut off without anybody having asked for it."""
        self.silent = asyncio.Event()
        self.silent.set()
        self.url = ""

    async def generate(self, request: web.Request) -> web.Response:
        body = await request.json()
        self.bodies.append(body)
        await self.silent.wait()
        if self.faults:
            self.faults -= 1
            return web.json_response({}, status=503)
        several = isinstance(body["input_ids"][0], list)
        prompts = body["input_ids"] if several else [body["input_ids"]]
        if [REFUSED] in prompts:
            return web.json_response({"error": "too long"}, status=400)
        names = [f"{body['rid']}_{i}" for i in range(len(prompts))] if several else [body["rid"]]
        answers = [
            answer(name, ids, "abort" if name in self.cut else "stop")
            for name, ids in zip(names, prompts, strict=True)
            if name not in self.lost
        ]
        return web.json_response(answers[::-1] if several else answers[0])


@pytest.fixture
async def server(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Server]:
    monkeypatch.setattr(client_module, "FIRST_PAUSE_S", 0.001)
    server = Server()
    app = web.Application()
    app.router.add_post("/generate", server.generate)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    host, port = runner.addresses[0][:2]
    server.url = f"http://{host}:{port}"
    yield server
    server.silent.set()
    await runner.cleanup()


@pytest.fixture
async def client(server: Server) -> AsyncIterator[GenerateClient]:
    async def ready() -> None:
        pass

    client = GenerateClient(server.url, timeout_s=20, max_retries=1, wait_ready=ready)
    yield client
    await client.close()


async def group(
    client: GenerateClient, prompts: list[int], scope: Scope | None = None, **sampling: Any
) -> list[Any]:
    """What becomes of each prompt's request; all are sent at the same moment."""
    with requests_of(scope or Scope(), set()):
        asked = [
            client.generate([token], {"max_new_tokens": 9, **sampling}, token, together=True)
            for token in prompts
        ]
        done = await asyncio.gather(*asked, return_exceptions=True)
    return [d if isinstance(d, BaseException) else d.token_ids for d in done]


async def test_those_of_a_group_are_one_request_and_each_has_its_own_answer(
    server: Server, client: GenerateClient
):
    found = await asyncio.gather(group(client, [1, 2, 3]), group(client, [4, 5]))
    assert found == [[[1], [2], [3]], [[4], [5]]]
    assert [body["input_ids"] for body in server.bodies] == [[[1], [2], [3]], [[4], [5]]]
    assert all(body["sampling_params"] == {"max_new_tokens": 9} for body in server.bodies)
    assert [seeds_of(body["custom_labels"]) for body in server.bodies] == [[1, 2, 3], [4, 5]]
    assert len({body["rid"] for body in server.bodies}) == 2


async def test_one_alone_is_an_ordinary_request_with_its_seed(
    server: Server, client: GenerateClient
):
    assert await group(client, [4]) == [[4]]
    [body] = server.bodies
    assert body["input_ids"] == [4]
    assert body["sampling_params"]["sampling_seed"] == 4


async def test_those_that_are_sampled_otherwise_go_apart(server: Server, client: GenerateClient):
    scope = Scope()
    found = await asyncio.gather(
        group(client, [1, 2], scope), group(client, [3, 4], scope, temperature=0.5)
    )
    assert found == [[[1], [2]], [[3], [4]]]
    assert [body["input_ids"] for body in server.bodies] == [[[1], [2]], [[3], [4]]]


async def test_what_fails_together_is_sent_again_one_by_one(server: Server, client: GenerateClient):
    server.faults = 1
    assert await group(client, [1, 2]) == [[1], [2]]
    assert [body["input_ids"] for body in server.bodies] == [[[1], [2]], [1], [2]]
    assert [body["sampling_params"]["sampling_seed"] for body in server.bodies[1:]] == [1, 2]


async def test_a_fault_that_stays_is_told_to_each(server: Server, client: GenerateClient):
    server.faults = 9
    assert [type(found) for found in await group(client, [1, 2])] == [GenerationError] * 2


async def test_a_prompt_that_is_refused_holds_no_other_up(server: Server, client: GenerateClient):
    first, refused, last = await group(client, [1, REFUSED, 3])
    assert (first, last) == ([1], [3])
    assert isinstance(refused, RequestRefusedError)


async def test_an_answer_that_is_missing_or_was_cut_off_is_asked_for_again(
    server: Server, client: GenerateClient
):
    server.lost, server.cut = {"rollflow-0._1"}, {"rollflow-0._2"}
    assert await group(client, [1, 2, 3]) == [[1], [2], [3]]
    assert [body["input_ids"] for body in server.bodies] == [[[1], [2], [3]], [2], [3]]


async def test_each_is_known_to_its_group_by_the_id_that_the_server_gave_it(
    server: Server, client: GenerateClient
):
    server.silent.clear()
    scope = Scope()
    asking = asyncio.create_task(group(client, [1, 2], scope))
    while not server.bodies:
        await asyncio.sleep(0.001)
    assert scope.requests == {"rollflow-0._0", "rollflow-0._1"}
    server.silent.set()
    assert await asking == [[1], [2]]
    assert not scope.requests


async def test_a_group_that_is_given_up_ends_its_request(server: Server, client: GenerateClient):
    server.silent.clear()
    asking = asyncio.create_task(group(client, [1, 2]))
    while not server.bodies:
        await asyncio.sleep(0.001)
    asking.cancel()
    await asyncio.wait({asking})
    async with asyncio.timeout(5):
        while client._together._sending:
            await asyncio.sleep(0.001)
