"""Qwen3's shapes with random weights, to measure speed with: every answer has its full length."""

from pathlib import Path
from typing import Any

from rollflow.storage.samples import Sample

from . import arithmetic

SHAPES: dict[str, dict[str, Any]] = {
    name: arithmetic.MODEL
    | {
        "vocab_size": 151936,
        "hidden_size": hidden,
        "intermediate_size": feed_forward,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 4096,
        "rope_theta": 1000000.0,
        "torch_dtype": "bfloat16",
    }
    for name, hidden, feed_forward, layers, heads in (
        ("0.6b", 1024, 3072, 28, 16),
        ("1.7b", 2048, 6144, 28, 16),
        ("4b", 2560, 9728, 36, 32),
    )
}


def make(folder: Path, shape: str) -> arithmetic.ArithmeticFiles:
    """Prompts, tokenizer and config.json of a shape; the prompts are arithmetic's, a few tokens each."""
    return arithmetic.make(folder, model=SHAPES[shape])


def share_of_even_tokens(sample: Sample) -> float:
    """A reward that differs among random answers, so that there is something to learn."""
    return sum(token % 2 == 0 for token in sample.response_ids) / max(1, len(sample.response_ids))
