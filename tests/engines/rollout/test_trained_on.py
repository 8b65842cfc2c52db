"""Which tokens are trained on: judged from the loss mask in the stored sample."""

import asyncio
from pathlib import Path
from typing import Any

import pytest

from rollflow.engines.hooks import GenerateContext
from rollflow.engines.rollout.collector import Collector, Episode
from rollflow.engines.rollout.engine import RolloutEngine
from rollflow.engines.rollout.grader import Grader
from rollflow.engines.rollout.trained_on import load_trained_on
from rollflow.storage.config import DataConfig, StoreConfig
from rollflow.storage.objects import Store
from rollflow.storage.refs import RunRef
from rollflow.storage.samples import Prompt, Sample, Status
from rollflow.storage.schema import from_table
from rollflow.storage.shards import ShardWriter, read_part

HERE = f"{__name__}"
VERSIONS: list[list[int]] = [[3, 3, 4], [4, 4, 4], [2, 3, 3], []]
"""Of the tokens of each sample of the group."""
OWN = [[True, True, True], [True, False, True], [True, True, False], []]


async def as_listed(engine: Any, prompt: Prompt, context: GenerateContext) -> Sample:
    versions, own = VERSIONS[context.index], OWN[context.index]
    n = len(versions)
    return context.sample(
        prompt, "", [1], [7] * n, "x" * n, [-0.5] * n, loss_mask=own, policy_versions=versions,
        status=Status.COMPLETED, finish_reason="stop",
    )  # fmt: skip


async def length(sample: Sample) -> float:
    return float(len(sample.response_ids))


def all_but_the_first(samples: list[Sample]) -> list[bool]:
    return [sample.index > 0 for sample in samples]


def one_verdict(samples: list[Sample]) -> list[bool]:
    return [True]


async def stored(folder: Path, sample_filter: str, *, mask_stale: bool) -> list[Sample]:
    """The samples of one group, read back from the store."""
    store = Store(StoreConfig(url=str(folder)))
    collector = Collector(
        RolloutEngine(None, DataConfig(path="x"), None),
        as_listed,
        Grader(f"{HERE}:length", 30.0),
        ShardWriter(store, RunRef("r", store.run_url("r")), "batch"),
        asyncio.Semaphore(8),
        4,
        trained_on=load_trained_on(sample_filter, mask_stale),
    )
    prompt = Prompt("p:0", 0, "p", "")
    contexts = [GenerateContext("r", 4, "000004/p:0", i, 0, {}, 4) for i in range(len(VERSIONS))]
    try:
        await collector.generate([[Episode(prompt, context) for context in contexts]])
    finally:
        await collector._grader.stop()
    rows = [s for p in await collector.write() for s in from_table(read_part(store, "batch", p))]
    return sorted(rows, key=lambda sample: sample.index)


async def test_tokens_of_older_weights_than_the_samples_newest_are_stored_as_masked(tmp_path: Path):
    samples = await stored(tmp_path, "", mask_stale=True)
    assert [s.loss_mask for s in samples] == [
        [False, False, True],
        [True, False, True],  # one version: as it was
        [False, True, False],  # and what was masked stays so
        [],
    ]
    assert [s.policy_versions for s in samples] == VERSIONS
    assert [s.reward for s in samples] == [3.0, 3.0, 3.0, 0.0]


async def test_unless_it_is_asked_for_tokens_of_all_weights_are_trained_on(tmp_path: Path):
    samples = await stored(tmp_path, "", mask_stale=False)
    assert [s.loss_mask for s in samples] == OWN


async def test_a_token_that_is_not_the_policys_own_makes_no_other_stale(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(f"{__name__}.OWN", [[True, True, False], *OWN[1:]])
    samples = await stored(tmp_path, "", mask_stale=True)
    assert samples[0].loss_mask == [True, True, False]


async def test_a_sample_that_the_filter_leaves_out_keeps_its_place_and_says_by_whom(tmp_path: Path):
    samples = await stored(tmp_path, f"{HERE}:all_but_the_first", mask_stale=True)
    assert samples[0].loss_mask == [False] * 3
    assert samples[0].metadata["not_trained_on"] == f"{HERE}:all_but_the_first"
    assert samples[2].loss_mask == [False, True, False]
    assert [s.reward for s in samples] == [3.0, 3.0, 3.0, 0.0]


async def test_a_filter_with_too_few_verdicts_is_refused_by_name(tmp_path: Path):
    with pytest.raises(ValueError, match=r"one_verdict gave 1 verdicts for 4 samples"):
        await stored(tmp_path, f"{HERE}:one_verdict", mask_stale=False)
