"""The reference policy of a KL term: the weights it was made of, lent to the model for a forward."""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

from .model import Model


class Reference:
    """A copy of a model's weights. Make it before the model is trained or restored."""

    def __init__(self, model: Model) -> None:
        self._weights = [p.detach().clone() for p in _parameters(model)]

    @contextlib.contextmanager
    def in_place(self, model: Model) -> Iterator[None]:
        """Inside the block the model computes with the reference weights. Do not train in it."""
        parameters = _parameters(model)
        policy = [p.data for p in parameters]
        try:
            _point(parameters, self._weights)
            yield
        finally:
            _point(parameters, policy)


def _parameters(model: Model) -> list[torch.nn.Parameter]:
    return [p for chunk in model.chunks for p in chunk.parameters()]


def _point(parameters: list[torch.nn.Parameter], data: list[Tensor]) -> None:
    for parameter, tensor in zip(parameters, data, strict=True):
        parameter.data = tensor
