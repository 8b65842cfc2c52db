"""Layers that megatron-core's local spec lacks: norms under sequence parallelism, norms after a block."""

from typing import Any

import torch
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.tensor_parallel import RowParallelLinear
from megatron.core.transformer.moe import moe_utils

from .attention import PackedAttention

if not hasattr(moe_utils, "te_general_gemm"):
    # megatron-core 0.16.1 asks for it without defining it where TransformerEngine is missing.
    moe_utils.te_general_gemm = None  # pyright: ignore[reportAttributeAccessIssue]


class Norm(torch.nn.RMSNorm):
    """RMSNorm that also works on a tensor parallel rank's part of the sequence."""

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__(hidden_size, eps=eps)
        # megatron-core then sums the gradient of this weight over the tensor parallel ranks.
        self.weight.sequence_parallel = config.sequence_parallel  # pyright: ignore[reportAttributeAccessIssue]


class NormedRowParallelLinear(RowParallelLinear):
    """A row parallel layer whose whole output is normalised before it joins the residual (GLM-4)."""

    def __init__(self, input_size: int, output_size: int, *, config: Any, **options: Any) -> None:
        super().__init__(input_size, output_size, config=config, **options)
        self.post_norm = Norm(config, output_size, eps=config.layernorm_epsilon)

    def forward(self, input_: torch.Tensor) -> tuple[torch.Tensor, Any]:
        output, bias = super().forward(input_)
        return self.post_norm(output), bias


def layer_spec(config: Any, *, use_te: bool, vp_stage: int | None, normed_output: bool) -> Any:
    """megatron-core's decoder spec with packed attention and, without TransformerEngine, our norms."""
    spec: Any = get_gpt_decoder_block_spec(
        config,
        use_transformer_engine=use_te,
        normalization=config.normalization,
        vp_stage=vp_stage,
    )
    for layer in spec.layer_specs:
        parts = layer.submodules
        attention = parts.self_attention.submodules
        attention.core_attention = PackedAttention
        if use_te:
            continue
        parts.input_layernorm = parts.pre_mlp_layernorm = Norm
        if config.qk_layernorm:
            attention.q_layernorm = attention.k_layernorm = Norm
        if normed_output:
            attention.linear_proj = NormedRowParallelLinear
            parts.mlp.submodules.linear_fc2 = NormedRowParallelLinear
    if not use_te:
        spec.layer_norm = Norm
    return spec
