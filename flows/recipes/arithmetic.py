"""Two-digit addition for a tiny model: prompts, a character tokenizer and a Qwen3 shape, from nothing.

A prompt is ``47+85=``, its answer the sum with the units digit first (``231``): carries then run
in the direction of generation, which a small model learns. Training and evaluation pairs are disjoint.
"""

import json
import random
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

CHARACTERS = "0123456789+="
EOS, PAD = "<eos>", "<pad>"
MODEL = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "vocab_size": 16,
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 64,
    "rope_theta": 10000.0,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
    "attention_bias": False,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "torch_dtype": "float32",
    "bos_token_id": None,
    "eos_token_id": 12,
    "pad_token_id": 13,
}
"""Qwen3's architecture at 0.7 million parameters."""
GPU_MODEL = MODEL | {
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "torch_dtype": "bfloat16",
}
"""36 million parameters, with heads of a size that GPU kernels are made for."""


@dataclass(frozen=True, slots=True)
class ArithmeticFiles:
    """What :func:`make` wrote."""

    model: Path
    train: Path
    heldout: Path


def make(
    folder: Path, *, heldout: int = 300, seed: int = 0, model: Mapping[str, Any] = MODEL
) -> ArithmeticFiles:
    """Write ``model/`` (config and tokenizer, no weights), ``train.jsonl`` and ``heldout.jsonl``.

    Args:
        heldout: evaluation pairs, drawn from the 8,100 by ``seed`` and kept out of training.
        model: config.json of the model.
    """
    pairs = [(a, b) for a in range(10, 100) for b in range(10, 100)]
    random.Random(seed).shuffle(pairs)
    files = ArithmeticFiles(folder / "model", folder / "train.jsonl", folder / "heldout.jsonl")
    files.model.mkdir(parents=True, exist_ok=True)
    _write_rows(files.heldout, pairs[:heldout])
    _write_rows(files.train, pairs[heldout:])
    _write_tokenizer(files.model)
    (files.model / "config.json").write_text(json.dumps(dict(model), indent=2))
    (files.model / "generation_config.json").write_text(
        json.dumps({"eos_token_id": 12, "pad_token_id": 13})
    )
    return files


def _write_rows(path: Path, pairs: list[tuple[int, int]]) -> None:
    rows = ({"prompt": f"{a}+{b}=", "label": str(a + b)[::-1]} for a, b in pairs)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def _write_tokenizer(folder: Path) -> None:
    vocab = {token: i for i, token in enumerate([*CHARACTERS, EOS, PAD])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token=PAD))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens([EOS, PAD])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": EOS,
        "pad_token": PAD,
        "model_max_length": MODEL["max_position_embeddings"],
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2))
