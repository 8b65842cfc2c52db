"""Qwen3's layers in an SGLang server on a GPU: in a step of decoding their two norms are no kernels.

A norm divides a row by its root mean square and multiplies it by the norm's weight; a projection follows. Here
the weight is in a second form of the projection's, the row is projected as it is, and what reads the
projection divides. What is added to the residual stream is added by the product that ends in it. A layer
of 0.6B without its attention takes a sixth less for 256 tokens. What is not plain is left to SGLang, as is
a model whose second form would take much of the memory.
"""

import importlib.metadata
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .server_heads import attended, is_plain, queries_of, turns_plainly

KNOWN = ("0.5.17", "0.5.18")
"""Versions of SGLang whose own way this was compared with."""
SHARE = 1 / 64
"""Of a GPU's memory, that second forms may take."""
KEPT = "rollflow_folded"
"""Attribute of a layer: its second form; of a model: the layers that have one."""
UPDATES = (
    "update_weights_from_disk",
    "update_weights_from_distributed",
    "update_weights_from_tensor",
    "update_weights_from_ipc",
    "_update_weights_from_flattened_bucket",
)
"""Methods of SGLang's weight updater by which a model gets other weights."""


@dataclass(frozen=True, slots=True)
class Folded:
    """Weights of a layer's projections, each column times the weight that the norm before it has there."""

    qkv_CH: Tensor
    gate_up_CH: Tensor


def install() -> None:
    """Have SGLang's Qwen3 do so in this process, before its model is built, but after :mod:`server_weights`."""
    if importlib.metadata.version("sglang") not in KNOWN:
        return
    from sglang.srt.environ import envs
    from sglang.srt.model_executor.forward_context import get_token_to_kv_pool
    from sglang.srt.model_executor.model_runner_components import load_model_utils, weight_updater
    from sglang.srt.models.qwen3 import Qwen3DecoderLayer
    from sglang.srt.runtime_context import get_lora, get_spec

    if envs.SGLANG_ENABLE_DETERMINISTIC_INFERENCE.get():
        return

    def fold_where_plain(model: Any) -> None:
        """Other parts of a server may look at what is between layers, and wrap products once they are loaded."""
        alone = torch.distributed.get_world_size() == 1
        if alone and not get_spec().speculative_algorithm and not get_lora().enable_lora:
            card = torch.cuda.get_device_properties(torch.cuda.current_device())
            fold(model, Qwen3DecoderLayer, SHARE * card.total_memory)

    get_loader = load_model_utils.get_model_loader
    setattr(load_model_utils, get_loader.__name__, _loading(get_loader, fold_where_plain))
    updater, running = weight_updater.WeightUpdater, []
    for update in UPDATES:
        setattr(updater, update, updating(getattr(updater, update), running))
    whole = Qwen3DecoderLayer.forward
    setattr(Qwen3DecoderLayer, whole.__name__, passing(whole, get_token_to_kv_pool, _Kernels))


def fold(model: Any, kind: type, limit_bytes: float) -> None:
    """Keep second forms of the plain layers of ``kind``, where together they take at most ``limit_bytes``."""
    layers = [part for part in model.modules() if type(part) is kind and is_foldable(part)]
    if sum(weight.nbytes for layer in layers for weight in _projections(layer)) > limit_bytes:
        return
    for layer in layers:
        setattr(layer, KEPT, Folded(*map(torch.empty_like, _projections(layer))))
    setattr(model, KEPT, tuple(layers))
    fold_again(model)


def fold_again(model: Any) -> None:
    """Second forms of what the weights are now."""
    with torch.no_grad():
        for layer in getattr(model, KEPT, ()):
            folded: Folded = getattr(layer, KEPT)
            qkv_CH, gate_up_CH = _projections(layer)
            torch.mul(qkv_CH, layer.input_layernorm.weight, out=folded.qkv_CH)
            torch.mul(gate_up_CH, layer.post_attention_layernorm.weight, out=folded.gate_up_CH)


def is_foldable(layer: Any) -> bool:
    """Whether a layer's products are of plain matrices in bfloat16, its norms divide alike, its heads turn plainly."""
    attention, mlp = layer.self_attn, layer.mlp
    products = attention.qkv_proj, attention.o_proj, mlp.gate_up_proj, mlp.down_proj
    norms = layer.input_layernorm, layer.post_attention_layernorm
    return (
        turns_plainly(attention)
        and all(_is_matrix(product) for product in products)
        and all(norm.weight.dtype == torch.bfloat16 for norm in norms)
        and all(norm.variance_epsilon == attention.q_norm.variance_epsilon for norm in norms)
        and all(norm.variance_size_override is None for norm in norms)
    )


def passing(
    whole: Callable[..., Any], cache: Callable[[], Any], kernels: Any
) -> Callable[..., Any]:
    """``whole``, SGLang's layer, with a short way for plain steps; ``cache`` gives that of keys and values.

    ``kernels.queries_of`` and ``kernels.swiglu_of`` are :mod:`heads_kernel`'s and :mod:`swiglu_kernel`'s.
    """

    def forward(
        self: Any,
        positions: Any,
        hidden_states: Any,
        forward_batch: Any,
        residual: Any,
        post_residual_addition: Any = None,
    ) -> Any:
        decodes = forward_batch.forward_mode.is_decode() and post_residual_addition is None
        folded: Folded | None = getattr(self, KEPT, None) if decodes else None
        attention, mlp = self.self_attn, self.mlp
        if not (folded and is_foldable(self) and is_plain(attention, cache())):
            return whole(
                self,
                positions,
                hidden_states,
                forward_batch,
                residual,
                post_residual_addition=post_residual_addition,
            )
        linear = torch.nn.functional.linear
        stream = hidden_states if residual is None else hidden_states + residual
        qkv, epsilon = linear(stream, folded.qkv_CH), attention.q_norm.variance_epsilon
        given = qkv, positions, forward_batch, cache(), kernels.queries_of, stream
        stream.addmm_(attended(attention, *given), attention.o_proj.weight.t())
        gate_up = linear(stream, folded.gate_up_CH)
        stream.addmm_(kernels.swiglu_of(gate_up, stream, epsilon), mlp.down_proj.weight.t())
        return stream, None

    return forward


def updating(
    update: Callable[..., tuple[bool, str]], running: list[Any]
) -> Callable[..., tuple[bool, str]]:
    """``update``, after which second forms are of the new weights; ``running``: updates that run, as one may
    call another.

    Where it fails nothing is done: it was refused, or put the old weights back, or left a server that has to
    be given weights anew.
    """

    def updated(self: Any, *arguments: Any, **options: Any) -> tuple[bool, str]:
        running.append(update)
        try:
            answer = update(self, *arguments, **options)
        finally:
            running.pop()
        if answer[0] and not running:
            fold_again(self.get_model())
        return answer

    return updated


class _Kernels:
    """Imported when they are first needed, as Triton is."""

    queries_of = staticmethod(queries_of)

    @staticmethod
    def swiglu_of(*arguments: Any) -> Tensor:
        from .swiglu_kernel import swiglu_of

        return swiglu_of(*arguments)


def _loading(get_loader: Callable[..., Any], then: Callable[[Any], None]) -> Callable[..., Any]:
    def get_model_loader(*arguments: Any, **options: Any) -> Any:
        """SGLang's, whose model has second forms: made here, they are of the memory that weights are in."""
        loader = get_loader(*arguments, **options)
        load = loader.load_model

        def load_model(*arguments: Any, **options: Any) -> Any:
            model = load(*arguments, **options)
            then(model)
            return model

        loader.load_model = load_model
        return loader

    return get_model_loader


def _projections(layer: Any) -> Iterator[Tensor]:
    yield layer.self_attn.qkv_proj.weight
    yield layer.mlp.gate_up_proj.weight


def _is_matrix(product: Any) -> bool:
    """Whether it multiplies by its weight and does nothing else. A LoRA's is wrapped, and no such."""
    return (
        type(getattr(product, "quant_method", None)).__name__ == "UnquantizedLinearMethod"
        and type(product.weight.data) is Tensor  # no quantized one that says it is of another type
        and product.weight.dtype == torch.bfloat16
        and product.weight.dim() == 2
        and product.bias is None
    )
