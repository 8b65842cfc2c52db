"""A model's layers through torch.compile: norms, rotary positions and activations in few kernels."""

from typing import Any

import torch

from .model_parts import unwrapped

RECOMPILE_LIMIT = 256
"""Layers share their code, and each may be compiled in several ways (with gradients, without)."""


def compile_layers(chunks: list[Any]) -> None:
    """Compile each layer of the pipeline stages ``chunks``, for rows of any number of tokens.

    The first forward and backward pass of each layer then take seconds. A compiled layer may round
    otherwise with gradients than without: passes that must agree bit for bit have to agree in that.
    """
    config: Any = torch._dynamo.config  # pyright: ignore[reportAttributeAccessIssue]
    config.recompile_limit = max(config.recompile_limit, RECOMPILE_LIMIT)
    config.allow_unspec_int_on_nn_module = True  # else each layer's number makes it another
    for chunk in chunks:
        for layer in unwrapped(chunk).decoder.layers:
            attend = layer.self_attention.core_attention
            # It looks up where sequences end: numbers that change with every row.
            attend.forward = torch.compiler.disable(attend.forward)
            layer.forward = torch.compile(layer.forward, dynamic=True)
