"""SGLang's attention on a CPU: sequences of one length go through it together.

Its backend ``torch_native`` takes one sequence after another in each layer, a dozen calls for each: half
of what a server of short answers does. What is not plain causal attention is left to it.
"""

import importlib.metadata
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
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

    Backend._run_sdpa_forward_extend = prefilling(Backend._run_sdpa_forward_extend)
    Backend._run_sdpa_forward_decode = decoding(Backend._run_sdpa_forward_decode)


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
        for (before, new), rows_B in alike(zip(before_R.tolist(), new_R.tolist(), strict=True)):
            tokens_BN = starts_R[rows_B, None] + torch.arange(new)
            slots_BL = slots_PL[places_R[rows_B], : before + new]
            output_THD[tokens_BN] = _attended(query_THD[tokens_BN], caches, slots_BL, how)
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
        for (before, new), rows_B in alike((length - 1, 1) for length in lengths_R.tolist()):
            slots_BL = slots_PL[places_R[rows_B], : before + new]
            output_RHD[rows_B] = _attended(query_RHD[rows_B, None], caches, slots_BL, how)[:, 0]
        return output_RHD

    return decode


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


def alike(lengths: Iterable[tuple[int, int]]) -> Iterator[tuple[tuple[int, int], Tensor]]:
    """(lengths, rows [B] that have them), in the order of their first rows; of many rows some at a time.

    ``lengths`` of each row: tokens before, and new ones.
    """
    found: dict[tuple[int, int], list[int]] = defaultdict(list)
    for row, of_row in enumerate(lengths):
        found[of_row].append(row)
    for of_rows, rows in found.items():
        for part in torch.tensor(rows).split(max(1, TOKENS // max(1, sum(of_rows)))):
            yield of_rows, part


def _attended(
    query_BNHD: Tensor,
    caches: tuple[Tensor, Tensor],
    slots_BL: Tensor,
    how: dict[str, Any],
) -> Tensor:
    """Queries of each sequence's last tokens, over all tokens of the sequence up to each of them."""
    new, length = query_BNHD.shape[1], slots_BL.shape[1]
    seen_NL = None
    if 1 < new < length:
        seen_NL = torch.ones(new, length, dtype=torch.bool).tril(length - new)
    keys_BGLD, values_BGLD = (cache[slots_BL].transpose(1, 2) for cache in caches)
    attended_BHND = scaled_dot_product_attention(
        query_BNHD.transpose(1, 2),
        keys_BGLD,
        values_BGLD,
        attn_mask=seen_NL,
        is_causal=new == length,
        scale=how.get("scaling"),
        enable_gqa=bool(how.get("enable_gqa")),
    )
    return attended_BHND.transpose(1, 2)
