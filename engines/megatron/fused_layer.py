"""A dense layer as two functions around its attention, compiled once for all layers, on a GPU.

megatron-core's layer is a tree of modules, each of whose steps reads and writes all activations.
Here the same arithmetic on the same parameters stands in two functions of tensors, which
torch.compile makes few kernels of; they are compiled in seconds, for rows of any length.
"""

from collections.abc import Callable
from functools import cache, partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .attention import PackedSequences
from .layers import Norm
from .model_parts import unwrapped

Halves = tuple[Callable[..., tuple[Tensor, Tensor, Tensor]], Callable[..., Tensor]]
"""(:func:`before_attention`, :func:`after_attention`), as they are or compiled."""


class HeadShape(NamedTuple):
    """How the columns of a layer's query-key-value product are cut."""

    groups: int
    size: int
    eps: float
    """Of the norms."""


def fuse_layers(chunks: list[Any], halves: Halves | None = None) -> int:
    """Let each layer that :func:`fits` compute by the two functions; how many do.

    ``halves`` are compiled ones by default.
    """
    layers = [layer for chunk in chunks for layer in unwrapped(chunk).decoder.layers]
    chosen = [layer for layer in layers if fits(layer)]
    for layer in chosen:
        layer.forward = partial(_forward, layer, halves or compiled_halves())
    return len(chosen)


def fits(layer: Any) -> bool:
    """Whether the layer is what the two functions compute, on one rank of the model.

    Norm, attention without bias but for queries, keys and values, norm, SwiGLU; as in Qwen2.5, Qwen3
    and Llama. Experts, norms after a block, rotary positions in pairs and recomputation are left to
    megatron-core.
    """
    config, attention, mlp = layer.config, layer.self_attention, layer.mlp
    linears = [
        attention.linear_proj,
        getattr(mlp, "linear_fc1", None),
        getattr(mlp, "linear_fc2", None),
    ]
    return (
        config.tensor_model_parallel_size == 1
        and config.context_parallel_size == 1
        and config.recompute_granularity is None
        and not config.rotary_interleaved
        and not config.fp32_residual_connection
        and config.gated_linear_unit
        and config.activation_func is F.silu
        and getattr(config, "activation_func_clamp_value", None) is None
        and config.hidden_dropout == 0
        and type(layer.input_layernorm) is Norm
        and type(layer.pre_mlp_layernorm) is Norm
        and all(
            linear is not None
            and getattr(linear, "bias", None) is None
            and not hasattr(linear, "post_norm")
            for linear in linears
        )
    )


def compiled_halves() -> Halves:
    """Both functions, compiled; the same objects for every model of the process."""
    return _compiled(before_attention), _compiled(after_attention)


@cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    compiled: Any = torch.compile(function)

    def call(*inputs: Any) -> Any:
        for tensor in inputs:
            if isinstance(tensor, Tensor) and not isinstance(tensor, torch.nn.Parameter):
                torch._dynamo.maybe_mark_dynamic(tensor, 0)  # tokens
        return compiled(*inputs)

    return call


def before_attention(
    hidden_TD: Tensor,
    cos_Td: Tensor,
    sin_Td: Tensor,
    norm_D: Tensor,
    qkv_ED: Tensor,
    bias_E: Tensor | None,
    query_norm_d: Tensor | None,
    key_norm_d: Tensor | None,
    shape: HeadShape,
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries ``[T, heads, size]``, keys and values ``[T, groups, size]``, turned by their positions."""
    normed_TD = F.rms_norm(hidden_TD, norm_D.shape, norm_D, shape.eps)
    mixed = F.linear(normed_TD, qkv_ED, bias_E).unflatten(1, (shape.groups, -1, shape.size))
    queries, keys, values = mixed[:, :, :-2].flatten(1, 2), mixed[:, :, -2], mixed[:, :, -1]
    if query_norm_d is not None:
        queries = F.rms_norm(queries, query_norm_d.shape, query_norm_d, shape.eps)
    if key_norm_d is not None:
        keys = F.rms_norm(keys, key_norm_d.shape, key_norm_d, shape.eps)
    cos, sin = cos_Td[:, None], sin_Td[:, None]
    return _turned(queries, cos, sin), _turned(keys, cos, sin), values.contiguous()


def after_attention(
    residual_TD: Tensor,
    attended_TE: Tensor,
    proj_DE: Tensor,
    norm_D: Tensor,
    gate_up_FD: Tensor,
    down_DF: Tensor,
    eps: float,
) -> Tensor:
    """Hidden states ``[T, D]`` that the next layer gets."""
    hidden_TD = residual_TD + F.linear(attended_TE, proj_DE)
    normed_TD = F.rms_norm(hidden_TD, norm_D.shape, norm_D, eps)
    gate_TF, up_TF = F.linear(normed_TD, gate_up_FD).chunk(2, -1)
    return hidden_TD + F.linear(F.silu(gate_TF) * up_TF, down_DF)


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """``x [T, heads, size]`` with the first numbers of each head turned, as many as angles."""
    turned, rest = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
    left, right = turned.chunk(2, -1)
    turned = turned * cos + torch.cat([-right, left], -1) * sin
    return torch.cat([turned, rest], -1) if rest.shape[-1] else turned


def _forward(
    layer: Any,
    halves: Halves,
    hidden_states: Tensor,
    rotary_pos_emb: Tensor | None = None,
    packed_seq_params: PackedSequences | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """In the place of the layer's own: ``[T, 1, D]`` -> (the same, no context)."""
    assert rotary_pos_emb is not None
    assert packed_seq_params is not None
    before, after = halves
    attention, mlp, eps = layer.self_attention, layer.mlp, layer.config.layernorm_epsilon
    residual_TD = hidden_states.squeeze(1)  # its gradient is a view too, one of [:, 0] a copy
    queries, keys, values = before(
        residual_TD,
        *packed_seq_params.turn(rotary_pos_emb, residual_TD.dtype),
        layer.input_layernorm.weight,
        attention.linear_qkv.weight,
        attention.linear_qkv.bias,
        _weight(attention.q_layernorm),
        _weight(attention.k_layernorm),
        HeadShape(
            attention.num_query_groups_per_partition, attention.hidden_size_per_attention_head, eps
        ),
    )
    attended = attention.core_attention(
        queries[:, None], keys[:, None], values[:, None], None, packed_seq_params=packed_seq_params
    )
    hidden_TD = after(
        residual_TD,
        attended.squeeze(1),
        attention.linear_proj.weight,
        layer.pre_mlp_layernorm.weight,
        mlp.linear_fc1.weight,
        mlp.linear_fc2.weight,
        eps,
    )
    return hidden_TD[:, None], None


def _weight(norm: Any) -> Tensor | None:
    return norm.weight if isinstance(norm, Norm) else None
