"""The policy as a megatron-core GPT model, built and loaded through mbridge.

Layers follow megatron-core's local spec, or TransformerEngine's where that is installed; attention
and rotary positions are ours (packed sequences, see :mod:`.attention`).
"""

import contextlib
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from mbridge.utils.layer import LinearForLastLayer
from transformers import AutoConfig, PretrainedConfig

from rollflow.engines.config import ModelConfig
from rollflow.engines.cpu.megatron import cuda_means_cpu

from .accumulate import add_gradients
from .attention import PackedRotaryEmbedding
from .bridges import BRIDGES, HAS_TE, Packed
from .cost import row_flops
from .fused import SETTINGS as FUSED
from .fused import fuse_rotary_positions
from .fused_layer import fuse_layers
from .loading import load_hugging_face
from .model_parts import unwrapped
from .router_replay import SETTING as REPLAY
from .router_replay import experts_of, replay_routers
from .settings import Settings


@dataclass(frozen=True)
class Model:
    """A rank's part of the policy."""

    bridge: Packed
    chunks: list[Any]
    """Pipeline stages on this rank, each wrapped in megatron-core's DistributedDataParallel."""
    hf_config: PretrainedConfig
    dtype: torch.dtype
    on_gpu: bool = False
    """Parts of the layers are compiled, and may round otherwise with gradients than without."""
    trained_tokens_only: bool = False
    """The output layer is applied to the tokens that are asked for, outside megatron-core's model."""

    @property
    def dtype_name(self) -> str:
        """As in ``model.dtype``: float32 or bfloat16."""
        return str(self.dtype).removeprefix("torch.")

    @property
    def vocab_size(self) -> int:
        return int(self.hf_config.vocab_size)

    @property
    def sequence_parallel(self) -> bool:
        """Tensor parallel ranks hold parts of the sequence between their layers."""
        return bool(self.bridge.config.sequence_parallel)

    def cost_of_row(self, tokens: int) -> float:
        """What training on a sequence of so many tokens costs, in FLOPs."""
        return row_flops(self.bridge.config, self.vocab_size, tokens)


def build_model(
    config: ModelConfig,
    settings: Settings,
    device: str,
    *,
    trained: bool = True,
    value_head: bool = False,
    router_replay: bool = False,
) -> Model:
    """Build this rank's part and load ``config.path``, or start from random weights.

    With ``value_head`` the output layer gives one number for each token, 0 before it is trained.
    With ``router_replay`` the routers follow rows that name experts; see :mod:`.router_replay`.

    Process groups and seeds must stand already; see :mod:`.parallel`. Random weights depend on the
    seed and the number of pipeline stages only. What is not ``trained`` has no place for gradients.

    Raises:
        ValueError: an architecture or rotary scaling that is not supported, a weight that does
            not fit config.json, or a replay for a model without routers.
        FileNotFoundError: ``config.path`` has no config.json.
    """
    hf_config = read_hf_config(config)
    if value_head:
        hf_config.tie_word_embeddings = False
    dtype = getattr(torch, config.dtype)
    ddp = {"grad_reduce_in_fp32": True, "use_distributed_optimizer": False, **settings.ddp}
    with cuda_means_cpu(), contextlib.redirect_stdout(sys.stderr):
        make: Any = bridge_class(hf_config.model_type)
        # The vocabulary is split evenly over the tensor parallel ranks.
        bridge = make(hf_config, dtype=dtype, make_vocab_size_divisible_by=settings.tensor_parallel)
        overrides = _model_overrides(hf_config, settings, device)
        bridge.set_extra_args(**overrides, **({REPLAY: True} if router_replay else {}))
        chunks = bridge.get_model(
            bf16=dtype is torch.bfloat16,
            wrap_with_ddp=trained,
            ddp_config=ddp,
            post_model_creation_callbacks=[
                _use_packed_positions,
                *([_use_value_head] if value_head else []),
            ],
        )
        if router_replay:
            experts_of(bridge.config)
            replay_routers(chunks)
        if not config.random_weights:
            parts = [unwrapped(chunk) for chunk in chunks]
            load_hugging_face(bridge, parts, config.path, output_layer=not value_head)
    on_gpu = device == "cuda"
    if on_gpu:
        fuse_layers(chunks)
        fuse_rotary_positions()
        if trained:
            add_gradients(chunks)
    trained_only = on_gpu and settings.tensor_parallel == 1 and not value_head
    return Model(bridge, chunks, hf_config, dtype, on_gpu, trained_only)


def build_empty(config: ModelConfig, settings: Settings) -> tuple[Packed, Any]:
    """The bridge and the whole model on one rank without any memory for weights (meta device)."""
    hf_config = read_hf_config(config)
    with cuda_means_cpu():
        make: Any = bridge_class(hf_config.model_type)
        bridge = make(hf_config, make_vocab_size_divisible_by=1)
        overrides = _model_overrides(hf_config, settings, "cpu")
        bridge.set_extra_args(**overrides, perform_initialization=False)
        [chunk] = bridge.get_model(bf16=False, init_model_with_meta_device=True)
    bridge.dtype = None  # weights keep the types that they have
    return bridge, chunk


def read_hf_config(config: ModelConfig) -> PretrainedConfig:
    """The checkpoint folder's config.json."""
    if not (Path(config.path) / "config.json").is_file():
        raise FileNotFoundError(
            f"model.path is {config.path!r}, which has no config.json; "
            "give the folder of a Hugging Face checkpoint"
        )
    return AutoConfig.from_pretrained(config.path, trust_remote_code=config.trust_remote_code)


def bridge_class(model_type: str) -> type[Packed]:
    """The bridge of an architecture (``model_type`` of config.json)."""
    if model_type not in BRIDGES:
        raise ValueError(
            f"model_type is {model_type!r} in the model's config.json; supported are "
            f"{', '.join(sorted(BRIDGES))}"
        )
    return BRIDGES[model_type]


def _model_overrides(
    hf_config: PretrainedConfig, settings: Settings, device: str
) -> dict[str, Any]:
    overrides: dict[str, Any] = {
        "calculate_per_token_loss": True,
        "use_cpu_initialization": device == "cpu",
        "init_method_std": float(getattr(hf_config, "initializer_range", None) or 0.02),
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "sequence_parallel": False,
    }
    if not HAS_TE:
        overrides |= {
            "moe_grouped_gemm": False,
            "masked_softmax_fusion": False,
            "persist_layer_norm": False,
            "bias_dropout_fusion": False,
            "bias_activation_fusion": False,
            "gradient_accumulation_fusion": False,
        }
        if device == "cuda":
            overrides |= FUSED
    return overrides | settings.transformer


def _use_packed_positions(model: Any, **_: Any) -> None:
    model.rotary_pos_emb = PackedRotaryEmbedding(model.rotary_pos_emb)


def _use_value_head(model: Any, post_process: bool, config: Any, **_: Any) -> None:
    if post_process:
        model.output_layer = LinearForLastLayer(config.hidden_size, 1, config=config)
        torch.nn.init.zeros_(model.output_layer.weight)
