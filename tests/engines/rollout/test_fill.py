"""Which groups a batch is filled with, and answers that stop and go on; the server is a local one."""

import asyncio
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from rollflow.engines.hooks import GenerateContext
from rollflow.engines.rollout.client import GenerateClient, Scope, requests_of
from rollflow.engines.rollout.collector import CUT, SURPLUS, Collector, Episode
from rollflow.engines.rollout.engine import RolloutEngine
from rollflow.engines.rollout.filters import nonzero_std
from rollflow.engines.rollout.grader import Grader
from rollflow.storage.config import DataConfig, StoreConfig
from rollflow.storage.objects import Store
from rollflow.storage.refs import RunRef
from rollflow.storage.samples import Prompt, Sample, Status
from rollflow.storage.shards import ShardWriter


class Slow:
    """Answers one token (its number) for each that it is allowed, or what it has when it is stopped."""

    def __init__(self) -> None:
        self.version = 1
        self.stopped: dict[str, asyncio.Event] = {}
        self.bodies: list[dict[str, Any]] = []
        self.begun = asyncio.Event()

    async def answer(self, request: web.Request) -> web.Response:
        body = await request.json()
        self.bodies.append(body)
        stop = self.stopped[body["rid"]] = asyncio.Event()
        self.begun.set()
        first = len(body["input_ids"])
        most = body["sampling_params"]["max_new_tokens"]
        whole = self.version > 1
        if not whole:
            await stop.wait()
        ids = list(range(first, first + (most if whole else 2)))
        meta = {
            "finish_reason": {"type": "length" if whole else "abort"},
            "weight_version": str(self.version),
            "output_token_logprobs": [[-float(i), i, None] for i in ids],
        }
        return web.json_response({"output_ids": ids, "meta_info": meta})

    async def abort(self, rid: str | None) -> None:
        for name, stop in self.stopped.items():
            if rid in (None, name):
                stop.set()


async def served(slow: Slow) -> tuple[web.AppRunner, GenerateClient]:
    app = web.Application()
    app.router.add_post("/generate", slow.answer)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    host, port = runner.addresses[0][:2]

    async def ready() -> None:
        return None

    url = f"http://{host}:{port}"
    return runner, GenerateClient(
        url, timeout_s=20, max_retries=0, wait_ready=ready, abort=slow.abort
    )


async def test_an_answer_goes_on_under_new_weights_from_its_last_token():
    slow = Slow()
    runner, client = await served(slow)
    asking = asyncio.create_task(client.generate([0, 1, 2], {"max_new_tokens": 5}, 7))
    await slow.begun.wait()
    await client.hold()
    assert not asking.done()
    slow.version = 2
    client.release()
    done = await asking
    assert done.token_ids == [3, 4, 5, 6, 7]
    assert done.logprobs == [-3.0, -4.0, -5.0, -6.0, -7.0]
    assert done.policy_versions == [1, 1, 2, 2, 2]
    assert done.finish_reason == "length"
    assert slow.bodies[1]["input_ids"] == [0, 1, 2, 3, 4]
    assert slow.bodies[1]["sampling_params"] == {"max_new_tokens": 3, "sampling_seed": 7}
    await client.close()
    await runner.cleanup()


async def test_a_cut_answer_is_what_there_is_of_it():
    slow = Slow()
    runner, client = await served(slow)
    scope, versions = Scope(), set[int]()

    async def ask() -> Any:
        with requests_of(scope, versions):
            return await client.generate([0], {"max_new_tokens": 5}, 7)

    asking = asyncio.create_task(ask())
    await slow.begun.wait()
    await client.cut(scope)
    done = await asking
    assert (done.token_ids, done.finish_reason, versions) == ([1, 2], "abort", {1})
    await client.close()
    await runner.cleanup()


def row_reward(sample: Sample) -> float:
    return float(sample.index) if sample.source_row % 2 else 1.0


async def echo(engine: Any, prompt: Prompt, context: GenerateContext) -> Sample:
    return context.sample(
        prompt, "", [1], [2], "", [-0.5], status=Status.COMPLETED, finish_reason="stop"
    )


def group(row: int) -> list[Episode]:
    prompt = Prompt(f"p:{row}", row, "p", "")
    return [
        Episode(prompt, GenerateContext("r", 0, f"000000/p:{row}", i, row * 10 + i, {}, 0))
        for i in range(2)
    ]


def collector(folder: Path, function: Any, **options: Any) -> Collector:
    store = Store(StoreConfig(url=str(folder)))
    writer = ShardWriter(store, RunRef("r", store.run_url("r")), "batch")
    engine = RolloutEngine(None, DataConfig(path="x"), None)
    grader = Grader(f"{__name__}:row_reward", 60.0)
    return Collector(engine, function, grader, writer, asyncio.Semaphore(64), 4, **options)


async def test_a_dynamic_filter_asks_for_groups_until_there_are_enough(tmp_path: Path):
    batch = collector(tmp_path, echo, dynamic_filter=nonzero_std)
    waves = iter([[group(0), group(1), group(2)], [group(3), group(4), group(5)]])

    async def wave() -> list[list[Episode]]:
        return next(waves, [])

    await batch.fill(2, wave, early=False)
    await batch._grader.stop()
    assert [o.group_id for o in batch.members] == ["000000/p:1", "000000/p:3"]
    reasons = {o.group_id[-1]: o.reason for o in batch.others}
    assert reasons == dict.fromkeys("024", "all rewards 1") | {"5": SURPLUS}
    assert sum(part.rows for part in await batch.write()) == 12


async def test_the_first_groups_that_finish_are_the_batch_and_others_are_kept_as_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("rollflow.engines.rollout.collector.CUT_GRACE_S", 0.05)

    async def the_first_never_ends(engine: Any, prompt: Prompt, context: Any) -> Sample:
        if prompt.row == 0 and context.index == 1:
            await asyncio.Event().wait()
        return await echo(engine, prompt, context)

    batch = collector(tmp_path, the_first_never_ends)

    async def no_more() -> list[list[Episode]]:
        return []

    await batch.fill(2, no_more, early=True, first=[group(0), group(1), group(2)])
    await batch._grader.stop()
    assert {o.group_id for o in batch.members} == {"000000/p:1", "000000/p:2"}
    [cut] = batch.others
    assert (cut.group_id, cut.reason) == ("000000/p:0", CUT)
    assert [s.status for s in cut.samples] == [Status.COMPLETED, Status.ABORTED]
    assert [s.seed for s in cut.samples] == [0, 1]
