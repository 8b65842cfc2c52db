"""Hugging Face's names of weights, and SGLang's, which fuses some of them. Imports nothing heavy."""

import re

FUSED = {
    "q_proj": ("qkv_proj", 0),
    "k_proj": ("qkv_proj", 1),
    "v_proj": ("qkv_proj", 2),
    "gate_proj": ("gate_up_proj", 0),
    "up_proj": ("gate_up_proj", 1),
}
"""Hugging Face module -> the module that SGLang fuses it into, and its place there."""

EXPERT = re.compile(r"(.+\.mlp\.experts)\.(\d+)\.(gate|up|down)_proj\.weight")
"""A weight of one expert. SGLang keeps those of a layer in two tensors: ``w13``, with gate and up of
one expert after another, and ``w2``."""


def server_name(name: str) -> tuple[str, int]:
    """SGLang's name of the parameter that holds ``name``, and the place of ``name`` in it."""
    if found := EXPERT.fullmatch(name):
        experts, number, part = found[1], int(found[2]), found[3]
        if part == "down":
            return f"{experts}.w2_weight", number
        return f"{experts}.w13_weight", 2 * number + (part == "up")
    for module, (fused, place) in FUSED.items():
        if f".{module}." in name:
            return name.replace(f".{module}.", f".{fused}."), place
    return name, 0
