"""Reward functions that misbehave: each costs its own call and nothing else."""

import asyncio
import os
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from rollflow.engines.rollout import reward_pool
from rollflow.engines.rollout.grader import Grader
from rollflow.storage.samples import Sample, Status

HERE = f"{__name__}"
TIMEOUT_S = 6.0
SLACK_S = 20.0
"""Starting processes on a busy machine."""
SAMPLE = Sample(
    run="r", step=0, group_id="g", index=0, prompt_id="p", source_row=0, episode_id="g#0",
    prompt_text="", response_text="", prompt_ids=[], response_ids=[1], loss_mask=[True],
    rollout_logprobs=[0.0], policy_versions=[0], status=Status.COMPLETED, finish_reason="stop",
)  # fmt: skip


def hangs(sample: Sample) -> float:
    while sample.index == 0:
        pass
    return 1.0


def always_hangs(sample: Sample) -> float:
    time.sleep(10**6)
    return 1.0


def ends_its_process(sample: Sample) -> float:
    if sample.index == 0:
        os._exit(3)
    return 1.0


def forks(sample: Sample) -> float:
    os.fork()
    return 1.0


def ten_gigabytes(sample: Sample) -> float:
    if sample.index == 0:
        bytearray(10 << 30)
    return 1.0


def prints(sample: Sample) -> float:
    print("x" * (8 << 20))
    os.write(2, b"x" * (1 << 20))
    return 1.0


def hangs_later(sample: Sample) -> float:
    while sample.index == 30:
        pass
    return 1.0


def ends_its_process_later(sample: Sample) -> float:
    if sample.index == 30:
        os._exit(3)
    return 1.0


def takes_away(sample: Sample) -> float:
    return sample.metadata["tests"].pop()


def is_one(argument: object) -> float:
    return 1.0


def nan(sample: Sample) -> float:
    return float("nan") if sample.index == 0 else 1.0


def raises(sample: Sample) -> float:
    return {}[sample.index] if sample.index == 0 else 1.0


async def blocks_its_loop(sample: Sample) -> float:
    if sample.index == 0:
        time.sleep(TIMEOUT_S + 3)
    return 1.0


def ranks(samples: list[Sample]) -> list[float]:
    return [float(i) for i, _ in enumerate(samples)]


async def scored(
    name: str, n: int = 6, metadata: dict[str, Any] | None = None, **options: object
) -> tuple[list[Sample], float]:
    grader = Grader(f"{HERE}:{name}", TIMEOUT_S, memory_bytes=1 << 30, **options)  # pyright: ignore[reportArgumentType]
    await grader.start()
    started = time.monotonic()
    try:
        samples = await grader.score_group(
            [replace(SAMPLE, index=i, metadata={**(metadata or {})}) for i in range(n)]
        )
    finally:
        seconds = time.monotonic() - started
        await grader.stop()
    return samples, seconds


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("hangs", "no reward within 6 s"),
        ("ends_its_process", "exit code 3"),
        ("ten_gigabytes", "MemoryError"),
        ("nan", "return a finite number"),
        ("raises", "KeyError"),
    ],
)
async def test_a_call_that_fails_fails_its_own_sample_only(name: str, reason: str):
    samples, seconds = await scored(name)
    assert samples[0].status is Status.FAILED
    assert samples[0].reward is None
    assert reason in samples[0].metadata["error"]
    assert [s.reward for s in samples[1:]] == [1.0] * 5
    assert seconds < TIMEOUT_S + SLACK_S


@pytest.mark.parametrize("name", ["forks", "prints"])
async def test_what_a_function_forks_or_prints_changes_nothing(name: str):
    samples, _ = await scored(name)
    assert [s.reward for s in samples] == [1.0] * 6


async def test_a_function_that_always_hangs_costs_a_batch_one_time_out():
    samples, seconds = await scored("always_hangs", 24, workers=2)
    assert {s.status for s in samples} == {Status.FAILED}
    assert seconds < 2 * TIMEOUT_S + SLACK_S


async def test_an_async_function_that_blocks_does_not_block_the_engine():
    beats = 0

    async def beat() -> None:
        nonlocal beats
        while True:
            await asyncio.sleep(0.1)
            beats += 1

    heart = asyncio.create_task(beat())
    samples, seconds = await scored("blocks_its_loop", 1)
    heart.cancel()
    assert samples[0].status is Status.FAILED
    assert beats > 5
    assert seconds < TIMEOUT_S + SLACK_S


async def test_a_group_reward_sees_the_whole_group():
    samples, _ = await scored("ranks", 4, group=True)
    assert [s.reward for s in samples] == [0.0, 1.0, 2.0, 3.0]


@pytest.mark.parametrize(
    ("name", "reason"),
    [("hangs_later", "no reward within 6 s"), ("ends_its_process_later", "exit code 3")],
)
async def test_of_quick_calls_that_are_sent_together_one_that_fails_fails_alone(
    name: str, reason: str, monkeypatch: pytest.MonkeyPatch
):
    messages: list[int] = []
    send = reward_pool._Worker.send

    async def counted(self: reward_pool._Worker, arguments: Sequence[Any]) -> None:
        messages.append(len(arguments))
        await send(self, arguments)

    monkeypatch.setattr(reward_pool._Worker, "send", counted)
    monkeypatch.setattr(reward_pool, "MESSAGE_S", 60.0)
    samples, seconds = await scored(name, 40, workers=1)
    assert max(messages) == reward_pool.MESSAGE_CALLS
    assert [s.index for s in samples if s.reward is None] == [30]
    assert reason in samples[30].metadata["error"]
    assert {s.reward for s in samples} == {None, 1.0}
    assert seconds < TIMEOUT_S + SLACK_S


async def test_what_a_function_changes_in_a_sample_is_changed_in_no_other(
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(reward_pool, "MESSAGE_S", 60.0)
    samples, _ = await scored("takes_away", 40, workers=1, metadata={"tests": [1.0, 2.0]})
    assert [s.reward for s in samples] == [2.0] * 40


async def test_a_pool_that_was_stopped_is_asked_in_vain():
    pool = reward_pool.RewardPool(f"{HERE}:is_one", 1, 1 << 30)
    await pool.stop()
    with pytest.raises(reward_pool.GradeError, match="ended"):
        await pool.call(1, TIMEOUT_S)


async def test_what_cannot_be_sent_to_a_process_fails_alone(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(reward_pool, "MESSAGE_S", 60.0)
    pool = reward_pool.RewardPool(f"{HERE}:is_one", 1, 1 << 30)
    calls = [pool.call(argument, TIMEOUT_S) for argument in (1, 2, lambda: 3, 4)]
    try:
        answers = await asyncio.gather(*calls, return_exceptions=True)
    finally:
        await pool.stop()
    assert "no process can be sent the samples" in str(answers.pop(2))
    assert answers == [[(1.0, {})]] * 3
