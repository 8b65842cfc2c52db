"""Elementwise work of megatron-core's layers in few kernels, on a GPU, by torch.compile.

A layer without TransformerEngine starts dozens of small kernels for rotary positions and for the
gated activation, and the GPU waits for Python. What is compiled here are functions that all layers
share: they are compiled once, in seconds, for rows of any length.
"""

from functools import cache
from typing import Any

import torch
from megatron.core.models.common.embeddings import rope_utils

SETTINGS: dict[str, Any] = {"bias_activation_fusion": True}
"""megatron-core's own: SwiGLU forward and backward as compiled functions."""


@cache
def fuse_rotary_positions() -> None:
    """Let every layer of this process turn queries and keys by one compiled function."""
    turn: Any = rope_utils._apply_rotary_pos_emb_bshd
    rope_utils._apply_rotary_pos_emb_bshd = torch.compile(turn, dynamic=True)
