"""Rotary positions of a checkpoint, as arguments of megatron-core's GPT model."""

from typing import Any

from transformers import PretrainedConfig


def rotary_args(hf_config: PretrainedConfig) -> dict[str, Any]:
    """Rotary base, share of a head that is rotated, and scaling.

    transformers 5 keeps them in ``rope_parameters``.

    Raises:
        ValueError: a scaling that megatron-core does not compute the same.
    """
    rope = getattr(hf_config, "rope_parameters", None) or getattr(hf_config, "rope_scaling", None)
    rope = dict(rope or {})
    base = rope.get("rope_theta") or getattr(hf_config, "rope_theta", None) or 10000.0
    share = rope.get("partial_rotary_factor") or getattr(hf_config, "partial_rotary_factor", None)
    common = {"rotary_base": base, "rotary_percent": float(share or 1.0)}
    kind = rope.get("rope_type", "default")
    if kind == "llama3":
        fixed = {"low_freq_factor": 1, "high_freq_factor": 4}
        fixed["original_max_position_embeddings"] = 8192
        other = {name: rope.get(name) for name, value in fixed.items() if rope.get(name) != value}
        if other:
            raise ValueError(
                f"rope_parameters of the model's config.json have {other}; megatron-core's llama3 "
                f"scaling knows only {fixed}"
            )
        return {**common, "rope_scaling": True, "rope_scaling_factor": rope["factor"]}
    if kind == "linear":
        return {**common, "seq_len_interpolation_factor": rope["factor"]}
    if kind != "default":
        raise ValueError(
            f"rope_type is {kind!r} in the model's config.json; supported are default, linear "
            "and llama3"
        )
    return common
