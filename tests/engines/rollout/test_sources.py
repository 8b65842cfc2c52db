"""Sources of prompts as the settings name them: their weights, and the curriculum and buffer hooks."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from rollflow.engines.rollout.config import BufferConfig, HooksConfig, RolloutConfig
from rollflow.engines.rollout.datasets import Asked, takes_groups, training_dataset
from rollflow.engines.rollout.producer import make_buffer
from rollflow.storage.buffer import BufferState, DataBuffer, Kept
from rollflow.storage.config import DataConfig, StoreConfig
from rollflow.storage.objects import Store
from rollflow.storage.refs import RunRef
from rollflow.storage.samples import Prompt

HERE = f"{__name__}"


async def reward(sample: Any) -> float:
    return 0.0


def hard_ones_later(step: int, weights: dict[str, float]) -> dict[str, float]:
    assert weights == {"easy.jsonl": 3.0, "hard.jsonl": 1.0}
    return weights if step else {**weights, "hard.jsonl": 0.0}


def no_such_source(step: int, weights: dict[str, float]) -> dict[str, float]:
    return {"medium.jsonl": 1.0}


def nothing(step: int, weights: dict[str, float]) -> dict[str, float]:
    return dict.fromkeys(weights, 0.0)


def longest_wait_last(kept: Kept) -> float:
    return -kept.step


def colder(prompt: Prompt, step: int) -> dict[str, float]:
    return {"temperature": 0.5 if step > 3 else 1.0}


def data(folder: Path) -> list[DataConfig]:
    found: list[DataConfig] = []
    for name, weight in (("easy", 3.0), ("hard", 1.0)):
        path = folder / f"{name}.jsonl"
        rows = [
            {"prompt": f"{name} {i}", "metadata": {"sampling": {"top_k": 5}} if i == 2 else {}}
            for i in range(40)
        ]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        found.append(DataConfig(path=str(path), weight=weight))
    return found


class Text:
    """A tokenizer of which nothing is asked."""


def buffer(folder: Path, kept: list[Kept] | None = None, priority: str = "", **hooks: str):
    rollout = RolloutConfig(
        reward=f"{HERE}:reward",
        batch_size=8,
        buffer=BufferConfig(priority=priority or "first_in"),
    )
    store = Store(StoreConfig(url=str(folder / "store")))
    dataset = training_dataset(store, Text(), None, data(folder), rollout, HooksConfig(**hooks))
    state = BufferState(kept=kept or [])
    return dataset, make_buffer(dataset, rollout, HooksConfig(**hooks), state)


def shares(drawn: DataBuffer, steps: range) -> Counter[str]:
    sources = [d.prompt.prompt_id.rpartition(":")[0] for s in steps for d in drawn.draw(8, s, 0)]
    return Counter(sources)


def test_sources_are_drawn_by_the_weights_of_the_settings(tmp_path: Path):
    _, drawn = buffer(tmp_path)
    for step in range(5):
        assert shares(drawn, range(step, step + 1)) == {"easy.jsonl": 6, "hard.jsonl": 2}


def test_a_curriculum_hook_gives_each_step_its_shares(tmp_path: Path):
    _, drawn = buffer(tmp_path, curriculum=f"{HERE}:hard_ones_later")
    assert shares(drawn, range(1)) == {"easy.jsonl": 8}
    assert shares(drawn, range(1, 5)) == {"easy.jsonl": 24, "hard.jsonl": 8}


@pytest.mark.parametrize(
    ("hook", "message"),
    [
        ("no_such_source", r"'medium.jsonl', which is no source; there is \['easy.jsonl', 'hard"),
        ("nothing", "all weights of the sources"),
    ],
)
def test_a_curriculum_that_no_prompt_can_follow_is_refused(tmp_path: Path, hook: str, message: str):
    _, drawn = buffer(tmp_path, curriculum=f"{HERE}:{hook}")
    with pytest.raises(ValueError, match=message):
        drawn.draw(8, 0, 0)


def test_a_priority_of_ones_own_decides_who_is_drawn_first(tmp_path: Path):
    waiting = [Kept(f"{s:06d}/easy.jsonl:{s}", s, f"easy.jsonl:{s}", s, "cut") for s in (1, 3, 2)]
    _, drawn = buffer(tmp_path, waiting, f"{HERE}:longest_wait_last")
    assert [d.prompt.row for d in drawn.draw(2, 4, 0)] == [3, 2]


def test_an_unknown_priority_is_refused_with_those_that_there_are(tmp_path: Path):
    with pytest.raises(ValueError, match="'fifo'; give first_in, oldest_policy, newest_policy or"):
        buffer(tmp_path, priority="fifo")


def test_a_prompts_own_sampling_is_laid_over_the_settings_and_the_hooks_over_both(tmp_path: Path):
    dataset, _ = buffer(tmp_path, sampling=f"{HERE}:colder")
    prompts = dataset.prompts[1:3]
    for step, temperature in ((3, 1.0), (4, 0.5)):
        asked = Asked(RunRef("r", "r"), step, step, "")
        plan = dataset.plan(prompts, step)
        plain, own = (
            dataset.episodes(group, prompt, asked)[0].context.sampling
            for group, prompt in zip(plan, prompts, strict=True)
        )
        assert plain["temperature"] == own["temperature"] == temperature
        assert (plain["top_k"], own["top_k"]) == (-1, 5)


def test_whole_groups_go_to_servers_of_ours_with_one_process_that_answers():
    def settings(**given: Any) -> RolloutConfig:
        return RolloutConfig.model_validate({"reward": "-", **given})

    several = {"tokenizer_worker_num": 2}
    group = {"name": "big", "servers": 1, "sglang": several}
    others = {"urls": ["http://127.0.0.1:1"], "weights": "file:///weights"}
    assert takes_groups(settings(), {})
    assert not takes_groups(settings(), several)
    assert not takes_groups(settings(groups=[group]), {})
    assert not takes_groups(settings(servers=0, external=others), {})
