"""Scalars that are gathered in pieces, over micro-batches and ranks, and describe the whole."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

AllReduce = Callable[[Tensor, Literal["sum", "max"]], None]
"""Reduces a tensor in place over a group of ranks. Injected: no process group is known here."""


@dataclass(frozen=True, slots=True)
class Metrics:
    """Means, kept as [sum, count] (float64, [2]), and maxima of numbers >= 0 (float64, []).

    Example: ``Metrics().merge(micro_batch_1).merge(micro_batch_2).reduce(all_reduce).values()``.
    """

    means: dict[str, Tensor] = field(default_factory=dict[str, Tensor])
    maxima: dict[str, Tensor] = field(default_factory=dict[str, Tensor])

    def merge(self, other: "Metrics") -> "Metrics":
        """This and another piece together. A name may be missing on either side."""
        return Metrics(
            _merge(self.means, other.means, torch.add),
            _merge(self.maxima, other.maxima, torch.maximum),
        )

    def reduce(self, all_reduce: AllReduce) -> "Metrics":
        """The same over all ranks of a group, in two collectives. Every rank has the same names."""
        return Metrics(
            _reduce(self.means, lambda tensor: all_reduce(tensor, "sum")),
            _reduce(self.maxima, lambda tensor: all_reduce(tensor, "max")),
        )

    def values(self) -> dict[str, float]:
        """The scalars by slash name. A mean over nothing is 0."""
        scalars: dict[str, float] = {}
        for name, sum_and_count in self.means.items():
            total, count = float(sum_and_count[0]), float(sum_and_count[1])
            scalars[name] = total / count if count else 0.0
        for name, highest in self.maxima.items():
            scalars[name] = float(highest)
        return scalars


def mean_of(values_T: Tensor) -> Tensor:
    """[sum, count] of ``values_T``: each token counts alike."""
    values_T = values_T.detach().double()
    return torch.stack([values_T.sum(), torch.ones_like(values_T).sum()])


def weighted_mean_of(values_T: Tensor, weights_T: Tensor) -> Tensor:
    """[sum of weights x values, sum of weights]."""
    weights_T = weights_T.detach().double()
    return torch.stack([(values_T.detach().double() * weights_T).sum(), weights_T.sum()])


def max_of(values_T: Tensor) -> Tensor:
    """The largest of ``values_T`` (>= 0); 0 where there is none."""
    values_T = values_T.detach().double()
    return torch.cat([values_T.new_zeros(1), values_T]).max()


def _merge(
    left: dict[str, Tensor], right: dict[str, Tensor], both: Callable[[Tensor, Tensor], Tensor]
) -> dict[str, Tensor]:
    merged = {**left, **right}
    return merged | {name: both(left[name], right[name]) for name in left.keys() & right.keys()}


def _reduce(tensors: dict[str, Tensor], all_reduce: Callable[[Tensor], None]) -> dict[str, Tensor]:
    names = sorted(tensors)
    if not names:
        return {}
    stacked = torch.stack([tensors[name] for name in names])
    all_reduce(stacked)
    return dict(zip(names, stacked.unbind(), strict=True))
