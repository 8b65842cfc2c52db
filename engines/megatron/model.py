"""The policy as a megatron-core GPT model, built and loaded through mbridge.

Layers follow megatron-core's local spec, or TransformerEngine's where that is installed; attention
and rotary positions are ours (packed sequences, see :mod:`.attention`).
"""

import contextlib
import importlib.util
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from mbridge.core import LLMBridge
from mbridge.models.llama import LLaMABridge
from mbridge.models.qwen2 import Qwen2Bridge
from mbridge.models.qwen3 import Qwen3Bridge
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from transformers import AutoConfig, PretrainedConfig

from rollflow.engines.config import ModelConfig
from rollflow.engines.cpu.megatron import cuda_means_cpu

from .attention import PackedAttention, PackedRotaryEmbedding
from .settings import Settings

HAS_TE = importlib.util.find_spec("transformer_engine") is not None


@dataclass(frozen=True)
class Model:
    """A rank's part of the policy."""

    bridge: LLMBridge
    chunks: list[Any]
    """Pipeline stages on this rank, each wrapped in megatron-core's DistributedDataParallel."""
    hf_config: PretrainedConfig
    dtype: torch.dtype

    @property
    def dtype_name(self) -> str:
        """As in ``model.dtype``: float32 or bfloat16."""
        return str(self.dtype).removeprefix("torch.")

    @property
    def vocab_size(self) -> int:
        return int(self.hf_config.vocab_size)


def build_model(config: ModelConfig, settings: Settings, device: str) -> Model:
    """Build this rank's part and load ``config.path``, or start from random weights.

    Process groups and seeds must stand already; see :mod:`.parallel`. Random weights depend on the
    seed only, not on the number of ranks.

    Raises:
        ValueError: an architecture or rotary scaling that is not supported.
        FileNotFoundError: ``config.path`` has no config.json.
    """
    hf_config = read_hf_config(config)
    dtype = getattr(torch, config.dtype)
    ddp = {"grad_reduce_in_fp32": True, "use_distributed_optimizer": False, **settings.ddp}
    with cuda_means_cpu(), contextlib.redirect_stdout(sys.stderr):
        make: Any = bridge_class(hf_config.model_type)
        bridge = make(hf_config, dtype=dtype)
        bridge.set_extra_args(**_model_overrides(hf_config, settings, device))
        chunks = bridge.get_model(
            bf16=dtype is torch.bfloat16,
            wrap_with_ddp=True,
            ddp_config=ddp,
            post_model_creation_callbacks=[_use_packed_positions],
        )
        if not config.random_weights:
            bridge.load_weights(chunks, config.path)
    return Model(bridge, chunks, hf_config, dtype)


def read_hf_config(config: ModelConfig) -> PretrainedConfig:
    """The checkpoint folder's config.json."""
    if not (Path(config.path) / "config.json").is_file():
        raise FileNotFoundError(
            f"model.path is {config.path!r}, which has no config.json; "
            "give the folder of a Hugging Face checkpoint"
        )
    return AutoConfig.from_pretrained(config.path, trust_remote_code=config.trust_remote_code)


def bridge_class(model_type: str) -> type[LLMBridge]:
    """The bridge of an architecture (``model_type`` of config.json)."""
    if model_type not in BRIDGES:
        raise ValueError(
            f"model_type is {model_type!r} in the model's config.json; supported are "
            f"{', '.join(sorted(BRIDGES))}"
        )
    return BRIDGES[model_type]


def unwrapped(chunk: Any) -> Any:
    """The GPT model inside DistributedDataParallel and mixed-precision wrappers."""
    while hasattr(chunk, "module"):
        chunk = chunk.module
    return chunk


def _model_overrides(
    hf_config: PretrainedConfig, settings: Settings, device: str
) -> dict[str, Any]:
    overrides: dict[str, Any] = {
        "calculate_per_token_loss": True,
        "use_cpu_initialization": device == "cpu",
        "init_method_std": float(getattr(hf_config, "initializer_range", None) or 0.02),
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
    }
    if not HAS_TE:
        overrides |= {
            "sequence_parallel": False,
            "masked_softmax_fusion": False,
            "persist_layer_norm": False,
            "bias_dropout_fusion": False,
            "bias_activation_fusion": False,
            "gradient_accumulation_fusion": False,
        }
    return overrides | settings.transformer


def _use_packed_positions(model: Any, **_: Any) -> None:
    model.rotary_pos_emb = PackedRotaryEmbedding(model.rotary_pos_emb)


class _Packed(LLMBridge):
    """What our layers change in an mbridge bridge, whichever architecture it is for."""

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

    def _get_gptmodel_args(self) -> dict[str, Any]:
        hf_config: Any = self.hf_config
        return {
            "vocab_size": hf_config.vocab_size,
            "max_sequence_length": hf_config.max_position_embeddings,
            "position_embedding_type": "rope",
            **_rotary_args(hf_config),
        }

    def _get_transformer_layer_spec(self, vp_stage: int | None = None) -> Any:
        self.has_vp_stage = True
        spec: Any = get_gpt_decoder_block_spec(
            self.config,
            use_transformer_engine=HAS_TE,
            normalization=self.config.normalization,
            vp_stage=vp_stage,
        )
        for layer in spec.layer_specs:
            layer.submodules.self_attention.submodules.core_attention = PackedAttention
        return spec


def _rotary_args(hf_config: PretrainedConfig) -> dict[str, Any]:
    """Rotary base and scaling; transformers 5 keeps both in ``rope_parameters``."""
    rope = getattr(hf_config, "rope_parameters", None) or getattr(hf_config, "rope_scaling", None)
    rope = dict(rope or {})
    base = rope.get("rope_theta") or getattr(hf_config, "rope_theta", None) or 10000.0
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
        return {"rotary_base": base, "rope_scaling": True, "rope_scaling_factor": rope["factor"]}
    if kind == "linear":
        return {"rotary_base": base, "seq_len_interpolation_factor": rope["factor"]}
    if kind != "default":
        raise ValueError(
            f"rope_type is {kind!r} in the model's config.json; supported are default, linear "
            "and llama3"
        )
    return {"rotary_base": base}


class PackedLlamaBridge(_Packed, LLaMABridge):
    """Llama 2 and 3."""


class PackedQwen2Bridge(_Packed, Qwen2Bridge):
    """Qwen2 and Qwen2.5."""


class PackedQwen3Bridge(_Packed, Qwen3Bridge):
    """Qwen3, dense."""


BRIDGES: dict[str, type[LLMBridge]] = {
    "llama": PackedLlamaBridge,
    "qwen2": PackedQwen2Bridge,
    "qwen3": PackedQwen3Bridge,
}
