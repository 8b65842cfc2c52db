"""The collector with a real store and hooks written here; the engine is a list of answers."""

import asyncio
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from rollflow.engines.hooks import GenerateContext
from rollflow.engines.rollout.client import GenerationError
from rollflow.engines.rollout.collector import Collector, Episode
from rollflow.engines.rollout.engine import RolloutEngine
from rollflow.engines.rollout.grader import Grader
from rollflow.engines.rollout.tally import Tally
from rollflow.storage.config import DataConfig, StoreConfig
from rollflow.storage.objects import Store
from rollflow.storage.refs import RunRef
from rollflow.storage.samples import Prompt, Sample, Status
from rollflow.storage.shards import ShardWriter, read_part

HERE = f"{__name__}"
Generate = Callable[[Any, Prompt, GenerateContext], Awaitable[Sample | list[Sample]]]

release = threading.Event()
"""Set where a slow reward function may end."""


def label_length(sample: Sample) -> dict[str, float]:
    return {"reward": float(len(sample.label or "")), "format": 1.0}


def right_and_maybe_short(sample: Sample) -> dict[str, float]:
    parts = {"reward": 1.0, "format": float(sample.index % 2)}
    return parts | ({"short": 3.0} if sample.index == 2 else {})


async def label_length_async(sample: Sample) -> float:
    await asyncio.sleep(0)
    return float(len(sample.label or ""))


def raises_for_odd(sample: Sample) -> float:
    if sample.index % 2:
        raise KeyError("no such column")
    return 1.0


def slow(sample: Sample) -> float:
    release.wait(60)
    return 1.0


def not_a_number(sample: Sample) -> float:
    return float("nan")


def echo(prompt: Prompt, context: GenerateContext, ids: tuple[int, ...] = (7, 8)) -> Sample:
    return context.sample(
        prompt, str(prompt.prompt), [1], list(ids), "xy", [-0.5] * len(ids),
        status=Status.COMPLETED, finish_reason="stop",
    )  # fmt: skip


async def plain(engine: Any, prompt: Prompt, context: GenerateContext) -> Sample:
    return echo(prompt, context)


def episodes(groups: int, size: int) -> list[list[Episode]]:
    return [
        [
            Episode(
                Prompt(f"p:{g}", g, "p", f"{g}", "12"),
                GenerateContext("run", 5, f"000005/p:{g}", i, 0, {}, 5),
            )
            for i in range(size)
        ]
        for g in range(groups)
    ]


class Batch:
    """A collector and a look at what it has stored."""

    def __init__(self, folder: Path, generate: Generate, reward: str, **options: Any) -> None:
        self.store = Store(StoreConfig(url=str(folder)))
        run = RunRef("run", self.store.run_url("run"))
        self.writer = ShardWriter(self.store, run, "batch")
        engine = RolloutEngine(None, DataConfig(path="x"), None)
        grader = self.grader = Grader(f"{HERE}:{reward}", options.pop("timeout_s", 30.0))
        slots = asyncio.Semaphore(options.pop("concurrency", 8))
        settings: dict[str, Any] = {"shard_groups": 2} | options
        self.collector = Collector(engine, generate, grader, self.writer, slots, **settings)

    async def run(self, groups: list[list[Episode]]) -> list[Sample]:
        try:
            await self.collector.generate(groups)
        finally:
            await self.grader.stop()
        return self.rows(await self.collector.write())

    def rows(self, parts: Any) -> list[Sample]:
        from rollflow.storage.schema import from_table

        return [s for p in parts for s in from_table(read_part(self.store, "batch", p))]


@pytest.mark.parametrize("reward", ["label_length", "label_length_async"])
async def test_every_sample_is_scored_and_stored_once(tmp_path: Path, reward: str):
    samples = await Batch(tmp_path, plain, reward).run(episodes(5, 3))
    assert sorted(s.sample_id for s in samples) == [
        f"000005/p:{g}#{i}" for g in range(5) for i in range(3)
    ]
    assert {s.reward for s in samples} == {2.0}
    assert all(s.grader.startswith(f"{HERE}:{reward}@") for s in samples)


async def test_parts_are_written_while_others_still_generate(tmp_path: Path):
    last = asyncio.Event()

    async def the_last_waits(engine: Any, prompt: Prompt, context: GenerateContext) -> Sample:
        if prompt.row == 4:
            await last.wait()
        return echo(prompt, context)

    batch = Batch(tmp_path, the_last_waits, "label_length")
    running = asyncio.create_task(batch.run(episodes(5, 3)))
    while len(batch.writer.parts) < 2:
        await asyncio.sleep(0.001)
    assert not running.done()
    last.set()
    assert len(await running) == 15
    assert [p.rows for p in batch.writer.parts] == [6, 6, 3]


async def test_a_generate_function_that_raises_makes_failed_samples(tmp_path: Path):
    async def breaks(engine: Any, prompt: Prompt, context: GenerateContext) -> Sample:
        if context.index == 1:
            raise ZeroDivisionError("tool broke")
        return echo(prompt, context)

    samples = await Batch(tmp_path, breaks, "label_length").run(episodes(2, 3))
    lost = [s for s in samples if s.status is Status.FAILED]
    assert [s.index for s in lost] == [1, 1]
    assert {s.reward for s in lost} == {None}
    assert all("tool broke" in s.metadata["error"] for s in lost)


async def test_an_episode_without_a_sample_is_a_failed_sample(tmp_path: Path):
    async def nothing(engine: Any, prompt: Prompt, context: GenerateContext) -> list[Sample]:
        return []

    [sample] = await Batch(tmp_path, nothing, "label_length").run(episodes(1, 1))
    assert sample.status is Status.FAILED


async def test_a_fault_of_the_servers_is_raised_and_not_stored(tmp_path: Path):
    async def lost(engine: Any, prompt: Prompt, context: GenerateContext) -> Sample:
        if prompt.row == 1:
            raise GenerationError("5 attempts failed")
        return echo(prompt, context)

    with pytest.raises(GenerationError, match="5 attempts failed"):
        await Batch(tmp_path, lost, "label_length").run(episodes(3, 2))


async def test_a_batch_that_is_given_up_writes_nothing_more(tmp_path: Path):
    reached = asyncio.Event()

    async def never(engine: Any, prompt: Prompt, context: GenerateContext) -> Sample:
        if prompt.row == 4:
            reached.set()
            await asyncio.Event().wait()
        return echo(prompt, context)

    batch = Batch(tmp_path, never, "label_length")
    running = asyncio.create_task(batch.run(episodes(5, 3)))
    await reached.wait()
    running.cancel()
    await asyncio.wait({running})
    others = asyncio.all_tasks() - {asyncio.current_task()}
    assert (running.cancelled(), others) == (True, set())


async def test_samples_of_many_sample_episodes_are_numbered_through(tmp_path: Path):
    async def two(engine: Any, prompt: Prompt, context: GenerateContext) -> list[Sample]:
        return [echo(prompt, context), echo(prompt, context)]

    samples = await Batch(tmp_path, two, "label_length").run(episodes(1, 2))
    assert [s.index for s in samples] == [0, 1, 2, 3]
    assert [s.episode_id[-2:] for s in samples] == ["#0", "#0", "#1", "#1"]


async def test_no_more_episodes_run_at_once_than_allowed(tmp_path: Path):
    running = most = 0

    async def counted(engine: Any, prompt: Prompt, context: GenerateContext) -> Sample:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await asyncio.sleep(0)
        running -= 1
        return echo(prompt, context)

    await Batch(tmp_path, counted, "label_length", concurrency=3).run(episodes(4, 4))
    assert most == 3


@pytest.mark.parametrize(
    ("reward", "reason"),
    [("raises_for_odd", "no such column"), ("not_a_number", "finite"), ("slow", "within 0.05 s")],
)
async def test_a_reward_that_is_none_makes_the_sample_failed(
    tmp_path: Path, reward: str, reason: str
):
    release.clear()
    batch = Batch(tmp_path, plain, reward, timeout_s=0.05 if reward == "slow" else 30.0)
    samples = await batch.run(episodes(1, 2))
    release.set()
    assert samples[1].status is Status.FAILED
    assert samples[1].reward is None
    assert reason in samples[1].metadata["error"]
    assert samples[0].reward == (1.0 if reward == "raises_for_odd" else None)


async def test_failed_samples_count_but_have_no_part_in_the_mean_reward(tmp_path: Path):
    batch = Batch(tmp_path, plain, "raises_for_odd")
    await batch.run(episodes(2, 4))
    metrics = batch.collector.tally.metrics("rollout")
    assert metrics["rollout/reward"] == 1.0
    assert metrics["rollout/failed"] == 4.0
    assert metrics["rollout/zero_std_groups"] == 1.0
    assert metrics["rollout/response_len"] == 2.0


async def test_each_named_part_of_the_rewards_has_its_mean_among_the_metrics(tmp_path: Path):
    batch = Batch(tmp_path, plain, "right_and_maybe_short")
    await batch.run(episodes(2, 4))
    metrics = batch.collector.tally.metrics("rollout")
    assert metrics["rollout/reward_parts/format"] == 0.5
    assert metrics["rollout/reward_parts/short"] == 3.0  # of the samples that have it
    assert metrics["rollout/reward"] == 1.0


def test_a_batch_without_rewards_has_no_reward_metric():
    assert "rollout/reward" not in Tally().metrics("rollout")
