"""How fast one server generates: through our client and the router, and asked as it is."""

import asyncio
import random
import statistics
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import aiohttp
import orjson

from rollflow.engines import cluster
from rollflow.engines.config import ClusterConfig, ModelConfig
from rollflow.engines.platform import detect

from .client import GenerateClient, Scope, requests_of
from .config import RolloutConfig
from .fleet import Fleet

GIB = 1 << 30
TIMEOUT_S = 300.0
WARM_UP_TOKENS = 32
GROUP = 8
"""Prompts that come as those of one group."""


async def measure(
    model_path: str,
    sglang: Mapping[str, Any],
    *,
    vocab_size: int,
    prompts: int,
    prompt_tokens: int,
    new_tokens: int,
    repeats: int,
    log_dir: str,
) -> dict[str, Any]:
    """Random prompts of one length, answers of one length, from random weights in bfloat16.

    ``raw``: one request with all prompts to the server itself. ``ours``: groups of ``GROUP`` prompts
    through client and router, as a run sends them. Both ask for log-probabilities, by turns. Then the
    server gives its memory back and takes it again.
    """
    device = detect().device
    rollout = RolloutConfig(concurrency=prompts, reward="-")
    ref = cluster.connect(ClusterConfig(device=device), "speed")
    fleet = Fleet(
        ModelConfig(path=model_path, dtype="bfloat16", random_weights=True),
        rollout,
        sglang,
        {},
        device,
        Path(log_dir),
        shares_gpu=device == "cuda",
    )
    started = time.perf_counter()
    try:
        await fleet.start()
        start_s = time.perf_counter() - started
        client = GenerateClient(
            fleet.router.url, timeout_s=TIMEOUT_S, max_retries=0, wait_ready=fleet.wait_ready
        )
        [server] = await fleet.servers()
        sampling = {"temperature": 1.0, "max_new_tokens": new_tokens, "ignore_eos": True}
        draw = random.Random(0)

        async def ours(asked: Sequence[list[int]], sampling: Mapping[str, Any]) -> int:
            return await _ask_client(client, asked, sampling, together=True)

        async def raw(asked: Sequence[list[int]], sampling: Mapping[str, Any]) -> int:
            return await _ask_server(server.url, asked, sampling)

        async with fleet.serving(0):
            ways = {"raw": raw, "ours": ours}
            for ask in ways.values():
                await ask(
                    _prompts(draw, prompts, prompt_tokens, vocab_size),
                    {**sampling, "max_new_tokens": WARM_UP_TOKENS},
                )
            rates: dict[str, list[float]] = {way: [] for way in ways}
            for _ in range(repeats):
                for way, ask in ways.items():
                    asked = _prompts(draw, prompts, prompt_tokens, vocab_size)
                    rates[way].append(await _tokens_per_s(ask, asked, sampling))
        slept = await _sleep_and_wake(fleet) if device == "cuda" else {}
        await client.close()
    finally:
        await fleet.stop()
        cluster.disconnect(ref)
    median = {way: statistics.median(found) for way, found in rates.items()}
    return {
        "start_s": start_s,
        "raw_tokens_per_s": median["raw"],
        "tokens_per_s": median["ours"],
        "fraction_of_raw": median["ours"] / median["raw"],
        "all_tokens_per_s": rates,
        **slept,
    }


async def _ask_client(
    client: GenerateClient,
    asked: Sequence[list[int]],
    sampling: Mapping[str, Any],
    *,
    together: bool,
) -> int:
    """Tokens that came through client and router, prompts in groups as a run sends them."""

    async def group(some: Sequence[list[int]]) -> int:
        with requests_of(Scope(), set()):
            done = await asyncio.gather(
                *(
                    client.generate(ids, dict(sampling), i, together=together)
                    for i, ids in enumerate(some)
                )
            )
        return sum(len(completion.token_ids) for completion in done)

    groups = (asked[i : i + GROUP] for i in range(0, len(asked), GROUP))
    return sum(await asyncio.gather(*(group(some) for some in groups)))


def _prompts(draw: random.Random, count: int, tokens: int, vocab_size: int) -> list[list[int]]:
    return [draw.choices(range(vocab_size), k=tokens) for _ in range(count)]


async def _tokens_per_s(
    ask: Callable[[Sequence[list[int]], Mapping[str, Any]], Awaitable[int]],
    asked: Sequence[list[int]],
    sampling: Mapping[str, Any],
) -> float:
    started = time.perf_counter()
    tokens = await ask(asked, sampling)
    return tokens / (time.perf_counter() - started)


async def _ask_server(url: str, asked: Sequence[list[int]], sampling: Mapping[str, Any]) -> int:
    body = {"input_ids": list(asked), "sampling_params": dict(sampling), "return_logprob": True}
    timeout = aiohttp.ClientTimeout(TIMEOUT_S)
    async with (
        aiohttp.ClientSession(timeout=timeout) as session,
        session.post(f"{url}/generate", json=body) as response,
    ):
        response.raise_for_status()
        answers = orjson.loads(await response.read())
        return sum(len(answer["output_ids"]) for answer in answers)


async def _sleep_and_wake(fleet: Fleet, repeats: int = 3) -> dict[str, float]:
    """Median seconds of either, and GiB that the server gives back."""
    import torch

    found: dict[str, list[float]] = {"sleep_s": [], "wake_s": [], "freed_gib": []}
    for _ in range(repeats):
        before = torch.cuda.mem_get_info()[0]
        started = time.perf_counter()
        await fleet.turns.sleep()
        found["sleep_s"].append(time.perf_counter() - started)
        found["freed_gib"].append((torch.cuda.mem_get_info()[0] - before) / GIB)
        started = time.perf_counter()
        await fleet.turns.wake()
        found["wake_s"].append(time.perf_counter() - started)
    return {name: statistics.median(values) for name, values in found.items()}
