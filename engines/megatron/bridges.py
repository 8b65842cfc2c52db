"""Architectures: mbridge's bridges, changed for our layers. ``BRIDGES`` lists those that work."""

import importlib.util
from typing import Any, ClassVar

import torch
from mbridge.core import LLMBridge
from mbridge.models.llama import LLaMABridge
from mbridge.models.qwen2 import Qwen2Bridge
from mbridge.models.qwen3 import Qwen3Bridge
from mbridge.models.qwen3moe import Qwen3MoEBridge
from torch import Tensor

from .layers import layer_spec
from .rotary import rotary_args

HAS_TE = importlib.util.find_spec("transformer_engine") is not None
_EXPERTS = ".mlp.experts.local_experts."


class Packed(LLMBridge):
    """What our layers change in an mbridge bridge, whichever architecture it is for."""

    normed_output = False
    """Each block's output is normalised before it joins the residual."""

    def _adjust_mapping_for_shared_weights(self) -> None:
        # mbridge writes into the mapping, which belongs to the class.
        self._DIRECT_MAPPING = dict(self._DIRECT_MAPPING)
        # The local spec keeps norms apart from the linear layer behind them.
        layer = "model.layers.{layer_number}."
        self._OTHER_MAPPING = {
            **self._OTHER_MAPPING,
            "input_layernorm.weight": [layer + "input_layernorm.weight"],
        }
        self._MLP_MAPPING = {
            **self._MLP_MAPPING,
            "pre_mlp_layernorm.weight": [layer + "post_attention_layernorm.weight"],
        }
        super()._adjust_mapping_for_shared_weights()
        if getattr(self.hf_config, "tie_word_embeddings", False):
            self._DIRECT_MAPPING["output_layer.weight"] = "model.embed_tokens.weight"

    def _get_gptmodel_args(self) -> dict[str, Any]:
        hf_config: Any = self.hf_config
        return {
            "vocab_size": hf_config.vocab_size,
            "max_sequence_length": hf_config.max_position_embeddings,
            "position_embedding_type": "rope",
            **rotary_args(hf_config),
        }

    def _get_transformer_layer_spec(self, vp_stage: int | None = None) -> Any:
        self.has_vp_stage = True
        return layer_spec(
            self.config, use_te=HAS_TE, vp_stage=vp_stage, normed_output=self.normed_output
        )


class PackedLlamaBridge(Packed, LLaMABridge):
    """Llama 2 and 3."""


class PackedQwen2Bridge(Packed, Qwen2Bridge):
    """Qwen2 and Qwen2.5."""


class PackedQwen3Bridge(Packed, Qwen3Bridge):
    """Qwen3, dense."""


class PackedGlm4Bridge(Packed, Qwen2Bridge):
    """GLM-4 and GLM-Z1 of 2025-04: norms after each block, half of each head rotated, in pairs."""

    normed_output = True
    _ATTENTION_MAPPING: ClassVar = {
        "self_attention.linear_proj.post_norm.weight": [
            "model.layers.{layer_number}.post_self_attn_layernorm.weight"
        ],
        **Qwen2Bridge._ATTENTION_MAPPING,
    }
    _MLP_MAPPING: ClassVar = {
        **Qwen2Bridge._MLP_MAPPING,
        "mlp.linear_fc1.weight": ["model.layers.{layer_number}.mlp.gate_up_proj.weight"],
        "mlp.linear_fc2.post_norm.weight": [
            "model.layers.{layer_number}.post_mlp_layernorm.weight"
        ],
    }

    def _build_config(self) -> Any:
        hf_config: Any = self.hf_config
        return self._build_base_config(
            add_qkv_bias=bool(hf_config.attention_bias), rotary_interleaved=True
        )


class PackedQwen3MoeBridge(Packed, Qwen3MoEBridge):
    """Qwen3 with a mixture of experts, one module for each expert; layers may be dense."""

    _MLP_MAPPING: ClassVar = {**Qwen3MoEBridge._MLP_MAPPING, **Qwen2Bridge._MLP_MAPPING}

    def _build_config(self) -> Any:
        hf_config: Any = self.hf_config
        layers = range(hf_config.num_hidden_layers)
        dense = set(getattr(hf_config, "mlp_only_layers", None) or ())
        every = getattr(hf_config, "decoder_sparse_step", 1)
        sparse = [int(i not in dense and (i + 1) % every == 0) for i in layers]
        options: dict[str, Any] = {} if all(sparse) else {"moe_layer_freq": sparse}
        return self._build_base_config(
            moe_ffn_hidden_size=hf_config.moe_intermediate_size,
            moe_router_topk=hf_config.num_experts_per_tok,
            num_moe_experts=hf_config.num_experts,
            moe_router_load_balancing_type="none",
            moe_router_score_function="softmax",
            # The softmax is over the chosen experts, or over all of them.
            moe_router_pre_softmax=not hf_config.norm_topk_prob,
            moe_grouped_gemm=HAS_TE,
            qk_layernorm=True,
            **options,
        )

    def _weight_name_mapping_mcore_local_to_global(
        self, model: torch.nn.Module, consider_ep: bool = True
    ) -> dict[str, str]:
        """As mbridge's, for experts that are modules: it knows them as numbered weights of one."""
        names = super()._weight_name_mapping_mcore_local_to_global(model, consider_ep and HAS_TE)
        first = 0
        if consider_ep and self.mpu.ep_size > 1:
            first = self.mpu.ep_rank * (self.config.num_moe_experts // self.mpu.ep_size)
        for local, name in names.items():
            if _EXPERTS in name:
                before, _, after = name.partition(_EXPERTS)
                expert, _, weight = after.partition(".")
                names[local] = f"{before}.mlp.experts.{weight}{first + int(expert)}"
        return names

    def _weight_merge_across_tp(
        self, mcore_weights_name: str, mcore_weights: list[Tensor], param: Tensor
    ) -> Tensor:
        """Experts have a tensor parallel size of their own."""
        if len(mcore_weights) == 1:
            return mcore_weights[0]
        if ".mlp.experts.linear_fc1" in mcore_weights_name:
            gates, ups = zip(*(w.chunk(2) for w in mcore_weights), strict=True)
            return torch.cat([*gates, *ups])
        if ".mlp.experts.linear_fc2" in mcore_weights_name:
            return torch.cat(mcore_weights, dim=1)
        return super()._weight_merge_across_tp(mcore_weights_name, mcore_weights, param)


BRIDGES: dict[str, type[Packed]] = {
    "glm4": PackedGlm4Bridge,
    "llama": PackedLlamaBridge,
    "qwen2": PackedQwen2Bridge,
    "qwen3": PackedQwen3Bridge,
    "qwen3_moe": PackedQwen3MoeBridge,
}
"""``model_type`` of config.json -> bridge."""
