"""The generation client against a local HTTP server that answers from a list."""

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from rollflow.engines.rollout import client as client_module
from rollflow.engines.rollout.client import (
    GenerateClient,
    GenerationError,
    RequestRefusedError,
    sampling_params,
)
from rollflow.engines.rollout.config import SamplingConfig

GOOD: dict[str, Any] = {
    "output_ids": [5, 6],
    "meta_info": {
        "finish_reason": {"type": "stop", "matched": 6},
        "weight_version": "7",
        "cached_tokens": 3,
        "output_token_logprobs": [[-0.5, 5, None], [-0.25, 6, None]],
    },
}
ABORTED = {**GOOD, "meta_info": {**GOOD["meta_info"], "finish_reason": {"type": "abort"}}}

Answer = tuple[int, dict[str, Any]]


class Server:
    """Gives its answers in turn, then good ones; a status of 0 breaks the connection."""

    def __init__(self) -> None:
        self.answers: list[Answer] = []
        self.bodies: list[dict[str, Any]] = []
        self.asked_ready = 0
        self.url = ""

    async def answer(self, request: web.Request) -> web.Response:
        self.bodies.append(await request.json())
        status, body = self.answers.pop(0) if self.answers else (200, GOOD)
        if status == 0:
            assert request.transport is not None
            request.transport.abort()
        return web.json_response(body, status=status)

    async def ready(self) -> None:
        self.asked_ready += 1


@pytest.fixture
async def server(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Server]:
    monkeypatch.setattr(client_module, "FIRST_PAUSE_S", 0.001)
    server = Server()
    app = web.Application()
    app.router.add_post("/generate", server.answer)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    host, port = runner.addresses[0][:2]
    server.url = f"http://{host}:{port}"
    yield server
    await runner.cleanup()


@pytest.fixture
async def client(server: Server) -> AsyncIterator[GenerateClient]:
    client = GenerateClient(server.url, timeout_s=20, max_retries=2, wait_ready=server.ready)
    yield client
    await client.close()


async def test_a_request_carries_tokens_and_seed_and_gives_tokens_and_logprobs(
    server: Server, client: GenerateClient
):
    completion = await client.generate([1, 2], {"temperature": 0.5, "max_new_tokens": 9}, 11)
    [body] = server.bodies
    assert body.pop("rid")
    assert body == {
        "input_ids": [1, 2],
        "sampling_params": {"temperature": 0.5, "max_new_tokens": 9, "sampling_seed": 11},
        "return_logprob": True,
    }
    assert completion.token_ids == [5, 6]
    assert completion.logprobs == [-0.5, -0.25]
    assert (completion.finish_reason, completion.policy_version) == ("stop", 7)
    assert completion.cached_tokens == 3


async def test_no_request_s_id_begins_with_another_s(server: Server, client: GenerateClient):
    await asyncio.gather(*(client.generate([1], {}, 0) for _ in range(12)))
    names = [body["rid"] for body in server.bodies]
    assert not [(a, b) for a in names for b in names if a != b and b.startswith(a)]


@pytest.mark.parametrize("fault", [(500, {}), (503, {}), (429, {}), (0, {}), (200, ABORTED)])
async def test_a_fault_is_retried_once_a_server_is_ready(
    server: Server, client: GenerateClient, fault: Answer
):
    server.answers = [fault, fault]
    assert (await client.generate([1], {}, 0)).token_ids == [5, 6]
    assert server.asked_ready == 2


async def test_retries_have_a_bound_and_the_error_has_the_last_fault(
    server: Server, client: GenerateClient
):
    server.answers = [(500, {"error": "first"})] * 2 + [(502, {"error": "last"})]
    with pytest.raises(GenerationError, match=r"3 attempts failed.*502.*last"):
        await client.generate([1], {}, 0)
    assert len(server.bodies) == 3


async def test_a_request_that_can_never_succeed_is_not_sent_again(
    server: Server, client: GenerateClient
):
    server.answers = [(400, {"error": "The input is longer than the context"})]
    with pytest.raises(RequestRefusedError, match="longer than the context"):
        await client.generate([1], {}, 0)
    assert len(server.bodies) == 1


async def test_what_ends_the_wait_for_a_server_ends_the_request(server: Server):
    async def given_up() -> None:
        raise LookupError("server-0 was given up")

    client = GenerateClient(server.url, timeout_s=20, max_retries=2, wait_ready=given_up)
    server.answers = [(500, {})]
    with pytest.raises(LookupError, match="given up"):
        await client.generate([1], {}, 0)
    await client.close()


async def test_a_silent_server_is_a_fault(server: Server, unused_address: Callable[[], str]):
    client = GenerateClient(unused_address(), timeout_s=20, max_retries=1, wait_ready=server.ready)
    with pytest.raises(GenerationError, match="2 attempts failed") as caught:
        await client.generate([1], {}, 0)
    assert isinstance(caught.value.__cause__, aiohttp.ClientConnectorError)
    await client.close()


@pytest.fixture
def unused_address() -> Callable[[], str]:
    from rollflow.engines.rollout.ports import PortLease

    return lambda: f"http://127.0.0.1:{PortLease().port}"


def test_sampling_parameters_leave_out_what_is_empty():
    params = sampling_params(SamplingConfig(stop=["\n"], max_new_tokens=9))
    assert params == {
        "temperature": 1.0,
        "top_p": 1.0,
        "top_k": -1,
        "max_new_tokens": 9,
        "stop": ["\n"],
        "ignore_eos": False,
    }


def scores(*pairs: tuple[float | None, int]) -> dict[str, Any]:
    return {"meta_info": {"input_token_logprobs": [[value, token, None] for value, token in pairs]}}


async def test_the_log_probabilities_of_given_tokens_are_asked_for_without_a_new_one(
    server: Server, client: GenerateClient
):
    server.answers = [(503, {}), (200, scores((None, 2), (-0.5, 3), (-1.5, 4)))]
    assert await client.logprobs([1, 2], [3, 4]) == [-0.5, -1.5]
    body = server.bodies[-1]
    assert body["input_ids"] == [1, 2, 3, 4]
    assert body["sampling_params"]["max_new_tokens"] == 0
    assert body["logprob_start_len"] == 1


async def test_log_probabilities_of_other_tokens_are_never_taken(
    server: Server, client: GenerateClient
):
    server.answers = [(200, scores((-0.5, 3), (-1.5, 9)))] * 3
    with pytest.raises(GenerationError, match="log-probabilities of other tokens"):
        await client.logprobs([1, 2], [3, 4])
