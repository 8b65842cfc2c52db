"""SGLang's attention on a CPU: sequences of one length go through it together.

Its backend ``torch_native`` takes one sequence after another in each layer, a dozen calls for each: half
of what a server of short answers does. What is not plain causal attention is left to it.
"""

import importlib.metadata
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

KNOWN = ("0.5.17", "0.5.18")
"""Versions of SGLang whose own way this was compared with."""
TOKENS = 1 << 16
"""Keys that are gathered at once, so that memory stays small where contexts are long."""


def install() -> None:
    """Have SGLang's backend do so, in this process and its forks."""
    if torch.cuda.is_available() or importlib.metadata.version("sglang") not in KNOWN:
        return
    from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend as Backend

    for way in (prefilling, decoding):
        whole = getattr(Backend, name := f"_run_sdpa_forward_{WAYS[way]}")
        setattr(Backend, name, way(whole))


def prefilling(whole: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """``whole``, SGLang's loop over sequences of which each has new tokens, with a short one if they are plain."""

    def extend(
        self: Any,
        query_THD: Tensor,
        output_THD: Tensor,
        keys_SGD: Tensor,
        values_SGD: Tensor,
        slots_PL: Tensor,
        places_R: Tensor,
        lengths_R: Tensor,
        before_R: Tensor,
        new_R: Tensor,
        *rest: Any,
        **how: Any,
    ) -> Tensor:
        caches = keys_SGD, values_SGD
        if not (is_plain(query_THD, caches, rest, how) and how.get("causal")):
            where = (slots_PL, places_R, lengths_R, before_R, new_R)
            return whole(self, query_THD, output_THD, *caches, *where, *rest, **how)
        starts_R = new_R.cumsum(0) - new_R
        for (before, new), rows_B in alike(
            list(zip(before_R.tolist(), new_R.tolist(), strict=True))
        ):
            tokens_BN = starts_R[rows_B, None] + torch.arange(new)
            slots_BL = slots_PL[places_R[rows_B], : before + new]
            seen_NL = (
                torch.ones(new, before + new, dtype=torch.bool).tril(before) if before else None
            )
            output_THD[tokens_BN] = _attended(
                query_THD[tokens_BN], caches, slots_BL, how, seen_NL, causal=not before
            )
        return output_THD

    return extend


def decoding(whole: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """``whole``, SGLang's loop over sequences of which each has one new token, likewise."""

    def decode(
        self: Any,
        query_RHD: Tensor,
        output_RHD: Tensor,
        keys_SGD: Tensor,
        values_SGD: Tensor,
        slots_PL: Tensor,
        places_R: Tensor,
        lengths_R: Tensor,
        *rest: Any,
        **how: Any,
    ) -> Tensor:
        caches = keys_SGD, values_SGD
        if not is_plain(query_RHD, caches, rest, how):
            where = (slots_PL, places_R, lengths_R)
            return whole(self, query_RHD, output_RHD, *caches, *where, *rest, **how)
        for length, rows_B in alike(lengths_R.tolist()):
            slots_BL = slots_PL[places_R[rows_B], :length]
            output_RHD[rows_B] = _attended(query_RHD[rows_B, None], caches, slots_BL, how)[:, 0]
        return output_RHD

    return decode


WAYS = {prefilling: "extend", decoding: "decode"}
"""What SGLang calls each."""


def is_plain(
    query: Tensor, caches: tuple[Tensor, Tensor], rest: Sequence[Any], how: dict[str, Any]
) -> bool:
    """Whether each token sees all tokens of its own sequence so far, by values of one type.

    ``rest`` is what was given by position after the lengths: the lengths of an encoder's.
    """
    window = how.get("sliding_window_size")
    return (
        all(given is None for given in rest)
        and not how.get("is_cross_attn")
        and (window is None or window < 0)
        and query.dtype == caches[0].dtype == caches[1].dtype
    )


def alike(kinds: Sequence[Any]) -> Iterator[tuple[Any, Tensor]]:
    """(kind, rows [B] that are of it), in the order of their first rows; no more of it than fit."""
    found: dict[Any, list[int]] = defaultdict(list)
    for row, kind in enumerate(kinds):
        found[kind].append(row)
    for kind, rows in found.items():
        length = sum(kind) if isinstance(kind, tuple) else kind
        for part in torch.tensor(rows).split(max(1, TOKENS // max(1, length))):
            yield kind, part


def _attended(
    query_BNHD: Tensor,
    caches: tuple[Tensor, Tensor],
    slots_BL: Tensor,
    how: dict[str, Any],
    seen_NL: Tensor | None = None,
    *,
    causal: bool = False,
) -> Tensor:
    keys_BGLD, values_BGLD = (cache[slots_BL].transpose(1, 2) for cache in caches)
    attended_BHND = scaled_dot_product_attention(
        query_BNHD.transpose(1, 2),
        keys_BGLD,
        values_BGLD,
        attn_mask=seen_NL,
        is_causal=causal,
        scale=how.get("scaling"),
        enable_gqa=bool(how.get("enable_gqa")),
    )
    return attended_BHND.transpose(1, 2)
