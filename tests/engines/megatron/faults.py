"""Faults that parallel training could have; a test that does not notice them proves nothing."""

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

from megatron.core.tensor_parallel import layers

from rollflow.engines.megatron import forward, rows


@contextmanager
def no_finalize() -> Iterator[None]:
    """Gradients are not reduced over the ranks."""
    with patch.object(forward, "finalize_model_grads", lambda *_, **__: None):
        yield


@contextmanager
def no_tensor_parallel_reduce() -> Iterator[None]:
    """Row parallel layers keep their rank's share of the sum."""
    name = "reduce_from_tensor_model_parallel_region"
    with patch.object(layers, name, lambda x, *_, **__: x):
        yield


@contextmanager
def shifted_labels() -> Iterator[None]:
    """Each place is trained on its neighbour's next token."""
    true_row = rows._row

    def row(*args):
        made = true_row(*args)
        return dataclasses.replace(made, targets_m=made.targets_m.roll(1))

    with patch.object(rows, "_row", row):
        yield


FAULTS = {f.__name__: f for f in (no_finalize, no_tensor_parallel_reduce, shifted_labels)}
