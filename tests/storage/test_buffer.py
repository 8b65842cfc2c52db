"""The data buffer: what it draws, what waits in it, and what it remembers."""

from collections import Counter

import pytest

from rollflow.storage.buffer import BufferState, DataBuffer, Kept, Source, oldest_policy
from rollflow.storage.ledger import Issue, IssuedGroup
from rollflow.storage.prompts import PromptSet
from rollflow.storage.refs import RunRef
from rollflow.storage.samples import Prompt


def source(name: str, rows: int = 10, weight: float = 1.0) -> Source:
    prompts = [Prompt(f"{name}:{i}", i, name, f"{i}") for i in range(rows)]
    return Source(name, PromptSet(prompts), weight)


def kept(row: int, step: int = 1, version: int | None = 1, reason: str = "cut") -> Kept:
    return Kept(f"{step:06d}/a:{row}", step, f"a:{row}", version, reason)


def buffer(*sources: Source, batch_size: int = 4, **options: object) -> DataBuffer:
    return DataBuffer(sources or (source("a"),), batch_size=batch_size, **options)  # pyright: ignore[reportArgumentType]


def test_new_prompts_are_those_that_the_step_draws_without_a_buffer():
    one = source("a")
    drawn = buffer(one)
    for step in range(8):
        expected = one.prompts.draw(step, 4, one.seed, one.shuffle)
        assert [d.prompt for d in drawn.draw(4, step, 0)] == expected


def test_what_was_put_back_comes_before_new_prompts_once():
    drawn = buffer()
    drawn.put_back([kept(3), kept(5)])
    first = drawn.draw(3, 2, oldest=0)
    assert [d.continues and d.continues.prompt_id for d in first] == ["a:3", "a:5", None]
    assert all(d.continues is None for d in drawn.draw(4, 3, oldest=0))


def test_a_group_that_is_too_old_is_begun_anew_and_counted():
    drawn = buffer()
    drawn.put_back([kept(3, version=1), kept(4, version=2)])
    draws = drawn.draw(2, 4, oldest=2)
    assert [(d.prompt.prompt_id, d.continues is None) for d in draws] == [
        ("a:3", True),
        ("a:4", False),
    ]
    assert drawn.state().dropped == {"too old": 1}


def test_priority_and_filter_decide_which_waiting_group_is_drawn():
    drawn = buffer(priority=oldest_policy, may_draw=lambda ks, step: [k for k in ks if k.step < 9])
    drawn.put_back([kept(1, version=3), kept(2, version=1), kept(3, step=9, version=0)])
    assert [d.prompt.prompt_id for d in drawn.draw(2, 4, oldest=0)] == ["a:2", "a:1"]
    assert [k.prompt_id for k in drawn.state().kept] == ["a:3"]


def test_sources_are_mixed_by_weight_over_any_stretch():
    drawn = buffer(source("a", weight=3.0), source("b"), batch_size=4)
    counts: Counter[str] = Counter()
    for step in range(10):
        counts.update(d.prompt.source for d in drawn.draw(4, step, 0))
        assert abs(counts["a"] - 3 * counts["b"]) <= 3
    assert counts == {"a": 30, "b": 10}


def test_a_curriculum_gives_each_step_its_own_shares():
    def late(step: int, weights: object) -> dict[str, float]:
        return {"a": 1.0, "b": 0.0} if step < 2 else {"a": 0.0, "b": 1.0}

    drawn = buffer(source("a"), source("b"), curriculum=late)
    shares = [{d.prompt.source for d in drawn.draw(4, step, 0)} for step in range(4)]
    assert shares == [{"a"}, {"a"}, {"b"}, {"b"}]


def test_the_state_after_a_crash_is_the_manifests_without_what_was_issued_since():
    drawn = buffer()
    drawn.put_back([kept(3), kept(5)])
    state = BufferState.from_json(drawn.state().to_json())
    [draw, *_] = drawn.draw(1, 2, oldest=0)
    group = IssuedGroup("000002/a:3", "a:3", 1, (7,), continues=draw.continues.group_id)  # pyright: ignore[reportOptionalMemberAccess]
    issue = Issue(RunRef("r", "r"), 2, 1, 2, (group,), cursors=drawn.state().cursors)
    assert state.after([issue]) == drawn.state()
    assert state.after([issue, issue]) == drawn.state()


@pytest.mark.parametrize(
    ("sources", "message"),
    [((source("a"), source("a")), "named 'a'"), ((source("a", weight=0.0),), "all weights")],
)
def test_sources_that_cannot_be_drawn_from_are_refused(sources, message):
    with pytest.raises(ValueError, match=message):
        buffer(*sources)
