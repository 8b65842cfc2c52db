"""Qwen3's attention in an SGLang server on a GPU: what comes before it, in a step of decoding, is one kernel.

SGLang normalises, rotates, copies queries and fills its cache by four, each some microseconds long, in
each layer of each step. What is not plain is left to SGLang.
"""

import importlib.metadata
from collections.abc import Callable
from typing import Any

import torch

KNOWN = ("0.5.17", "0.5.18")
"""Versions of SGLang whose own way this was compared with."""


def install() -> None:
    """Have SGLang's Qwen3 do so in this process, before its model is built."""
    if importlib.metadata.version("sglang") not in KNOWN:
        return
    from sglang.srt.environ import envs
    from sglang.srt.model_executor.forward_context import get_token_to_kv_pool
    from sglang.srt.models import qwen3

    if envs.SGLANG_ENABLE_DETERMINISTIC_INFERENCE.get():
        return
    attention = qwen3.Qwen3Attention
    whole = attention.forward
    setattr(attention, whole.__name__, attending(whole, get_token_to_kv_pool, queries_of))


def attending(
    whole: Callable[..., Any], cache: Callable[[], Any], queries_of: Callable[..., Any]
) -> Callable[..., Any]:
    """``whole``, SGLang's way, with a short one for plain steps; ``cache`` gives that of keys and values."""

    def forward(self: Any, positions: Any, hidden_states: Any, forward_batch: Any) -> Any:
        if not (forward_batch.forward_mode.is_decode() and is_plain(self, cache())):
            return whole(self, positions, hidden_states, forward_batch)
        qkv, _ = self.qkv_proj(hidden_states)
        return self.o_proj(attended(self, qkv, positions, forward_batch, cache(), queries_of))[0]

    return forward


def attended(
    attention: Any,
    qkv: Any,
    positions: Any,
    forward_batch: Any,
    cache: Any,
    queries_of: Callable[..., Any],
    *stream: Any,
) -> Any:
    """What a plain layer's attention gives for its projections; ``stream``: :mod:`heads_kernel`'s, if they lack
    a norm."""
    layer, epsilon = attention.attn.layer_id, attention.q_norm.variance_epsilon
    queries = queries_of(
        qkv,
        (attention.q_norm.weight, attention.k_norm.weight, epsilon),
        attention.rotary_emb.cos_sin_cache,
        positions,
        forward_batch.out_cache_loc,
        cache.get_key_buffer(layer),
        cache.get_value_buffer(layer),
        *stream,
    )
    return attention.attn(queries, None, None, forward_batch, save_kv_cache=False)


def is_plain(attention: Any, cache: Any) -> bool:
    """Whether this layer's heads are normalised, rotated as a whole, and kept as they are."""
    return (
        turns_plainly(attention)
        and type(cache).__name__ == "MHATokenToKVPool"
        and cache.dtype == cache.store_dtype == torch.bfloat16
        and not cache.is_quantized_kv_cache
        and attention.attn.k_scale is None
    )


def turns_plainly(attention: Any) -> bool:
    """What of :func:`is_plain` is known before there is a cache."""
    rotary = attention.rotary_emb
    return (
        type(rotary).__name__ == "RotaryEmbedding"
        and rotary.is_neox_style
        and rotary.rotary_dim == attention.head_dim
        and attention.head_dim & (attention.head_dim - 1) == 0
        and rotary.cos_sin_cache.dtype == torch.float32
        and attention.q_norm.variance_epsilon == attention.k_norm.variance_epsilon
        and attention.q_norm.weight.dtype == torch.bfloat16
    )


def queries_of(*arguments: Any) -> Any:
    """:mod:`heads_kernel`'s, imported when it is first needed, as Triton is."""
    from .heads_kernel import queries_of

    return queries_of(*arguments)
