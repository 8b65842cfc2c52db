"""Evaluation of several datasets through the manager itself; what generates is a function, no server."""

import json
import math
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from rollflow.engines.config import ModelConfig
from rollflow.engines.hooks import GenerateContext
from rollflow.engines.rollout.config import EvalConfig, HooksConfig, RolloutConfig, SamplingConfig
from rollflow.engines.rollout.manager import RolloutManager
from rollflow.storage.config import DataConfig, StoreConfig
from rollflow.storage.objects import Store
from rollflow.storage.refs import RunRef
from rollflow.storage.samples import Prompt, Sample, Status

HERE = f"{__name__}"


async def by_plan(engine: Any, prompt: Prompt, context: GenerateContext) -> Sample:
    """The prompt says what becomes of each sample: ``1`` right, ``0`` wrong, ``x`` raises."""
    outcome = str(prompt.prompt)[context.index]
    if outcome == "x":
        raise RuntimeError("no answer")
    assert context.sampling["temperature"] == (0.5 if prompt.source.endswith("a.jsonl") else 0.0)
    return context.sample(
        prompt, str(prompt.prompt), [1], [2], outcome, [-0.5],
        status=Status.COMPLETED, finish_reason="stop",
    )  # fmt: skip


async def as_planned(sample: Sample) -> float:
    return float(sample.response_text)


async def tenfold(sample: Sample) -> float:
    return 10 * float(sample.response_text)


def prompts(folder: Path, name: str, plans: list[str]) -> DataConfig:
    path = folder / f"{name}.jsonl"
    path.write_text("".join(json.dumps({"prompt": plan}) + "\n" for plan in plans))
    return DataConfig(path=str(path))


@pytest.fixture
async def manager(tmp_path: Path, models: tuple[Path, Path]) -> AsyncIterator[RolloutManager]:
    a = prompts(tmp_path, "a", ["1100", "10xx", "xxxx"])
    b = prompts(tmp_path, "b", ["010", "000"])
    store = StoreConfig(url=str(tmp_path / "store"))
    evals = [
        EvalConfig(
            name="a",
            data=a,
            n_samples_per_prompt=4,
            generate=f"{HERE}:by_plan",
            sampling=SamplingConfig(temperature=0.5),
        ),
        EvalConfig(
            name="b",
            data=b,
            n_samples_per_prompt=3,
            generate=f"{HERE}:by_plan",
            reward=f"{HERE}:tenfold",
            solved_at=10.0,
        ),
    ]
    manager = RolloutManager(
        RunRef("run", Store(store).run_url("run")),
        store,
        ModelConfig(path=str(models[0])),
        [a],
        RolloutConfig(servers=0, reward=f"{HERE}:as_planned", generate=f"{HERE}:by_plan"),
        HooksConfig(),
        evals,
        {},
        {},
        "cpu",
        str(tmp_path / "logs"),
    )
    await manager.start()
    yield manager
    await manager.stop()


def expected(k: int, n: int, right: list[int]) -> float:
    return sum(1 - math.comb(n - c, k) / math.comb(n, k) for c in right) / len(right)


async def test_each_dataset_has_its_own_n_reward_and_unbiased_pass_at_k(manager: RolloutManager):
    a = await manager.evaluate("a", 0, 0)
    b = await manager.evaluate("b", 0, 0)
    assert (a.groups, a.rows, b.groups, b.rows) == (3, 12, 2, 6)
    for k in (1, 2, 4):
        assert a.metrics[f"eval/a/pass@{k}"] == pytest.approx(expected(k, 4, [2, 1, 0]))
    assert a.metrics["eval/a/avg@4"] == pytest.approx((0.5 + 0.5) / 2)
    assert a.metrics["eval/a/failed"] == 6
    assert "eval/a/pass@3" not in a.metrics
    for k in (1, 2, 3):
        assert b.metrics[f"eval/b/pass@{k}"] == pytest.approx(expected(k, 3, [1, 0]))
    assert b.metrics["eval/b/avg@3"] == pytest.approx((10 / 3 + 0) / 2)
    assert not any(name.startswith("eval/b") for name in a.metrics)


def test_regular_evaluations_begin_after_the_delay():
    config = EvalConfig(name="a", data=DataConfig(path="a.jsonl"), every=4, delay=6)
    assert [step for step in range(14) if config.due(step)] == [8, 12]
