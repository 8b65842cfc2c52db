"""A checkpoint of any size with random weights, to measure conversions on."""

import json
from pathlib import Path

import torch
from torch import Tensor

from .plan import planned
from .tensor_file import TensorFileWriter

HIDDEN = 2048
LAYER_BYTES = 2 * (HIDDEN * HIDDEN * 3 + 3 * HIDDEN * 6144)
FILE_BYTES = 1 << 30


def make(folder: Path, size: int) -> int:
    """Write config.json and bfloat16 safetensors of about ``size`` bytes; the bytes written."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "vocab_size": 32768,
        "hidden_size": HIDDEN,
        "intermediate_size": 6144,
        "num_hidden_layers": max(1, size // LAYER_BYTES),
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "tie_word_embeddings": False,
        "dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    with planned(folder) as plan:
        shapes = list(plan.shapes.items())
    written = 0
    for number, names in enumerate(_files(shapes)):
        announced = {n: (torch.bfloat16, shape) for n, shape in names}
        with (folder / f"model-{number:05d}.safetensors").open("wb") as stream:
            out = TensorFileWriter(stream, announced)
            for name, shape in names:
                tensor = _random(shape)
                out.write(name, tensor)
                written += tensor.nbytes
    return written


def _files(shapes: list[tuple[str, tuple[int, ...]]]) -> list[list[tuple[str, tuple[int, ...]]]]:
    files: list[list[tuple[str, tuple[int, ...]]]] = [[]]
    filled = 0
    for name, shape in shapes:
        size = 2 * torch.Size(shape).numel()
        if files[-1] and filled + size > FILE_BYTES:
            files.append([])
            filled = 0
        files[-1].append((name, shape))
        filled += size
    return files


def _random(shape: tuple[int, ...]) -> Tensor:
    bits = torch.randint(-(1 << 15), 1 << 15, shape, dtype=torch.int16)
    return (bits.float() / (1 << 18)).to(torch.bfloat16)
