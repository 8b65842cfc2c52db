"""Which prompts a step takes is a pure function of the step, and no prompt is dropped."""

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rollflow.storage.order import draw_positions, group_ids
from rollflow.storage.prompts import PromptSet
from rollflow.storage.samples import Prompt

SIZES = st.tuples(st.integers(1, 40), st.integers(1, 40))


def draw(rows: int, step: int, n: int, seed: int = 0, shuffle: bool = True) -> list[int]:
    return draw_positions(rows, step, n, seed=seed, shuffle=shuffle)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(SIZES, st.integers(0, 3), st.booleans())
def test_every_epoch_holds_every_prompt_once(sizes, seed, shuffle):
    rows, n = sizes
    steps = 5 * rows // n + 1
    drawn = [i for step in range(steps) for i in draw(rows, step, n, seed, shuffle)]
    for epoch in range(len(drawn) // rows):
        assert sorted(drawn[epoch * rows : (epoch + 1) * rows]) == list(range(rows))


@settings(max_examples=200, deadline=None, derandomize=True)
@given(SIZES, st.integers(0, 200), st.integers(0, 3), st.booleans())
def test_no_batch_holds_a_prompt_twice_unless_it_is_larger_than_the_dataset(
    sizes, step, seed, shuffle
):
    rows, n = sizes
    counts = Counter(draw(rows, step, n, seed, shuffle))
    assert max(counts.values()) <= 1 if n <= rows else max(counts.values()) >= 2


def test_a_step_draws_the_same_whatever_was_drawn_before():
    forward = [draw(10, step, 4) for step in range(50)]
    assert [draw(10, step, 4) for step in reversed(range(50))] == forward[::-1]


def test_the_order_is_the_same_in_every_version():
    assert draw(8, 0, 8, seed=0) == [0, 2, 1, 5, 4, 3, 6, 7]
    assert draw(8, 1, 8, seed=0) == draw(8, 0, 8, seed=1)


def test_without_shuffle_the_order_is_the_files():
    assert [draw(5, step, 3, shuffle=False) for step in range(4)] == [
        [0, 1, 2], [3, 4, 0], [1, 2, 3], [4, 0, 1],
    ]  # fmt: skip


def test_another_seed_and_another_epoch_give_another_order():
    assert len({tuple(draw(50, 0, 50, seed)) for seed in range(5)}) == 5
    assert len({tuple(draw(50, step, 50)) for step in range(5)}) == 5


def test_a_late_epoch_of_a_large_dataset_is_drawn_at_once():
    assert len(set(draw(1000, 10**9, 300))) == 300
    assert len(set(draw(500, 10**9, 300))) == 300


def test_a_prompt_set_draws_its_prompts():
    prompts = PromptSet([Prompt(f"f:{i}", i, "f", str(i)) for i in range(10)])
    drawn = prompts.draw(3, 4, seed=0, shuffle=True)
    assert [p.row for p in drawn] == draw(10, 3, 4)


def test_groups_of_a_repeated_prompt_have_different_names():
    assert group_ids(7, ["a", "b", "a", "a"]) == [
        "000007/a",
        "000007/b",
        "000007/a~1",
        "000007/a~2",
    ]


@pytest.mark.parametrize(("rows", "step", "n"), [(0, 0, 1), (1, -1, 1), (1, 0, 0)])
def test_a_draw_of_nothing_is_refused(rows, step, n):
    with pytest.raises(ValueError, match="give positive numbers"):
        draw(rows, step, n)
