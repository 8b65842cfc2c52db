"""Which rows of a dataset a step takes: epochs laid end to end, each a permutation."""

from collections.abc import Sequence
from functools import lru_cache
from math import gcd

import numpy as np
import numpy.typing as npt

Rows = npt.NDArray[np.int64]


def draw_positions(rows: int, step: int, n: int, *, seed: int, shuffle: bool) -> list[int]:
    """Give the row numbers of a step's ``n`` draws: a pure function of its arguments.

    Every epoch holds each row once. Where a batch spans two epochs, rows of its first part are
    put off within the second, so that no batch of ``n <= rows`` holds a row twice.
    """
    if rows < 1 or n < 1 or step < 0:
        raise ValueError(f"draw of n = {n} from {rows} rows at step {step}; give positive numbers")
    return draw_from(rows, step * n, n, n, seed=seed, shuffle=shuffle)


def draw_from(rows: int, start: int, count: int, n: int, *, seed: int, shuffle: bool) -> list[int]:
    """Give the row numbers of ``count`` draws from position ``start`` on, for batches of ``n``."""
    positions = range(start, start + count)
    orders = {e: _order(rows, n, seed, shuffle, e) for e in {p // rows for p in positions}}
    return [int(orders[p // rows][p % rows]) for p in positions]


def group_ids(step: int, prompt_ids: Sequence[str]) -> list[str]:
    """Name the groups of a step: ``{step:06d}/{prompt_id}``.

    A prompt that a batch larger than its dataset holds again gets ``~1``, ``~2`` and so on.
    """
    seen: dict[str, int] = {}
    names: list[str] = []
    for prompt_id in prompt_ids:
        count = seen.get(prompt_id, 0)
        seen[prompt_id] = count + 1
        names.append(f"{step:06d}/{prompt_id}" + (f"~{count}" if count else ""))
    return names


@lru_cache(maxsize=16)
def _order(rows: int, n: int, seed: int, shuffle: bool, epoch: int) -> Rows:
    if n > rows:
        return _shuffled(rows, seed, shuffle, epoch)
    # Where an epoch begins with a batch nothing is put off, which is so every `period` epochs. And
    # only an epoch's first n rows are moved: one of 2n rows or more ends as it was shuffled.
    period = n // gcd(rows, n)
    first = epoch - min(epoch % period, 1 if rows >= 2 * n else period)
    order = _shuffled(rows, seed, shuffle, first)
    for e in range(first + 1, epoch + 1):
        before = order[rows - (e * rows) % n :] if (e * rows) % n else order[:0]
        order = _put_off(_shuffled(rows, seed, shuffle, e), before, n)
    return order


def _put_off(order: Rows, before: Rows, n: int) -> Rows:
    """Let ``order`` begin with ``n - len(before)`` rows that are not in ``before``."""
    if len(before) == 0:
        return order
    head, rest = order[:n], order[n:]
    fresh = np.flatnonzero(~np.isin(head, before))[: n - len(before)]
    return np.concatenate([head[fresh], np.delete(head, fresh), rest])


def _shuffled(rows: int, seed: int, shuffle: bool, epoch: int) -> Rows:
    if not shuffle:
        return np.arange(rows)
    # The raw stream of a bit generator is the same in every version of NumPy.
    keys = np.random.Philox(key=(seed + epoch) % 2**64).random_raw(rows)
    return np.argsort(keys, kind="stable")
