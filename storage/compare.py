"""Two runs side by side, sample by sample: which rewards, answers and samples differ."""

from dataclasses import dataclass, field
from typing import Any

from .objects import Store
from .query import connect, create_views
from .refs import RunRef


@dataclass(frozen=True, slots=True)
class Comparison:
    """What differs between the samples that two runs have under the same id."""

    both: int
    """Samples that both have."""
    only_left: int
    only_right: int
    other_text: int
    """Of those in both, how many answers differ."""
    other_reward: int
    mean_left: float | None
    """Mean reward over the samples in both."""
    mean_right: float | None
    rows: list[dict[str, Any]] = field(default_factory=list)
    """The samples whose rewards differ most: sample_id, step, left and right reward and grader."""


_PAIRS = """
CREATE TEMP TABLE pairs AS
SELECT coalesce(l.sample_id, r.sample_id) AS sample_id, coalesce(l.step, r.step) AS step,
  l.sample_id IS NOT NULL AS on_left, r.sample_id IS NOT NULL AS on_right,
  l.reward AS left_reward, r.reward AS right_reward, l.grader AS left_grader,
  r.grader AS right_grader, l.text IS DISTINCT FROM r.text AS other_text,
  l.reward IS DISTINCT FROM r.reward AS other_reward
FROM (SELECT sample_id, step, reward, grader, hash(response_ids) AS text FROM left_samples {where}) l
FULL JOIN (SELECT sample_id, step, reward, grader, hash(response_ids) AS text FROM right_samples {where}) r
USING (sample_id)
"""
_COUNTS = """
SELECT count(*) FILTER (on_left AND on_right), count(*) FILTER (NOT on_right),
  count(*) FILTER (NOT on_left), count(*) FILTER (on_left AND on_right AND other_text),
  count(*) FILTER (on_left AND on_right AND other_reward),
  avg(left_reward) FILTER (on_left AND on_right), avg(right_reward) FILTER (on_left AND on_right)
FROM pairs
"""
_ROWS = """
SELECT sample_id, step, left_reward, right_reward, left_grader, right_grader FROM pairs
WHERE on_left AND on_right AND other_reward
ORDER BY abs(right_reward - left_reward) DESC NULLS FIRST, sample_id LIMIT ?
"""


def compare_runs(
    left: tuple[Store, RunRef],
    right: tuple[Store, RunRef],
    step: int | None = None,
    rows: int = 20,
) -> Comparison:
    """Compare the samples of two runs, of one step or all."""
    connection = connect()
    for prefix, (store, run) in (("left_", left), ("right_", right)):
        create_views(connection, store, run, _PAIRS, prefix)
    where = "" if step is None else f"WHERE step = {int(step)}"
    connection.execute(_PAIRS.format(where=where))
    [counts] = connection.execute(_COUNTS).fetchall()
    found = connection.sql(_ROWS, params=[rows])
    return Comparison(*counts, rows=found.to_arrow_table().to_pylist())
