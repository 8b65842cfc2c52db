"""Attention and rotary positions over packed sequences, without a Python loop over sequences.

Sequences are laid end to end, ``T`` tokens in one row (the thd idea: no padding between them).
megatron-core's local attention refuses that and its rotary embedding loops over sequences, so both
are given here: positions are gathered once per forward, and attention groups sequences of similar
length into padded calls on a CPU, or calls PyTorch's variable-length flash kernel on a GPU.

Context parallel ranks share a row: of each sequence, cut into 2C chunks, rank r holds chunks r and
2C - 1 - r (zigzag), so that causal attention costs every rank the same. Keys and values are
gathered, queries stay.
"""

import functools
import inspect
import math
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.module import MegatronModule


@dataclass(frozen=True, slots=True)
class Layout:
    """How ranks share one row of packed sequences."""

    context_ranks: int = 1
    context_rank: int = 0
    multiple: int = 1
    """A rank's part of the row has a multiple of so many tokens (sequence parallel: the tensor
    parallel size)."""


@dataclass(frozen=True, slots=True)
class LengthGroup:
    """Sequences of similar length as rows of one padded block."""

    queries_BQ: torch.Tensor
    """Token of this rank behind each query of the block; padding repeats token 0."""
    keys_BL: torch.Tensor
    """Gathered token behind each key; the same as the queries where nothing is gathered."""
    seen_BQL: torch.Tensor | None
    """Which keys a query sees; None where that is the causal triangle."""
    kept_N: torch.Tensor
    """Places of the flattened queries that are not padding, in the order of ``tokens_N``."""
    tokens_N: torch.Tensor
    """Token of this rank at each kept place."""


@dataclass
class PackedSequences(PackedSeqParams):
    """One row of packed sequences as every layer sees it.

    The format is sbhd with a batch of one, so megatron-core applies rotary positions elementwise
    to what :class:`PackedRotaryEmbedding` gathered; ``cu_seqlens_q`` has the borders.
    """

    positions_T: torch.Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.long))
    """Position of each token of this rank in its own sequence."""
    source_T: torch.Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.long))
    """Its place in the whole row without padding, or -1 where it is padding."""
    groups: tuple[LengthGroup, ...] = ()
    """How attention lays the sequences out; empty where the flash kernel takes them as they are."""
    unpack_T: torch.Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.long))
    """Where token t stands in the concatenation of the groups' ``tokens_N``."""
    experts_TLK: torch.Tensor | None = None
    """Experts that each token goes to in each layer; None where the routers choose."""
    _turn: tuple[torch.Tensor, torch.Tensor] | None = None

    def turn(self, angles: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """(cosines, sines) of the tokens' ``angles [T, 1, 1, d]``, both [T, d]: the same in all layers."""
        if self._turn is None or self._turn[0].dtype is not dtype:
            flat = angles.flatten(1)
            self._turn = flat.cos().to(dtype), flat.sin().to(dtype)
        return self._turn


def pack(lengths: list[int], device: str = "cpu", layout: Layout | None = None) -> PackedSequences:
    """Describe sequences of ``lengths`` tokens laid end to end, as the rank of ``layout`` holds them."""
    layout = layout or Layout()
    whole, padded = _padded(lengths, layout)
    source, positions, ranks = _zigzag(whole, padded, layout)
    local = ranks == layout.context_rank
    groups: tuple[LengthGroup, ...] = ()
    if device == "cpu" or layout.context_ranks > 1:
        order = torch.cat([(ranks == r).nonzero().flatten() for r in range(layout.context_ranks)])
        groups = _length_groups(padded, positions[local], order.argsort(), layout.context_ranks)
    tokens = [g.tokens_N for g in groups] or [torch.empty(0, dtype=torch.long)]
    borders = torch.tensor([0, *padded]).cumsum(0).to(device=device, dtype=torch.int32)
    return PackedSequences(
        qkv_format="sbhd",
        cu_seqlens_q=borders,
        cu_seqlens_kv=borders,
        max_seqlen_q=max(padded),
        max_seqlen_kv=max(padded),
        positions_T=positions[local].to(device),
        source_T=source[local].to(device),
        groups=tuple(_to(group, device) for group in groups),
        unpack_T=torch.cat(tokens).argsort().to(device),
    )


def _padded(lengths: list[int], layout: Layout) -> tuple[list[int], list[int]]:
    """(lengths, padded lengths): to 2C chunks each, and a last sequence that is padding alone."""
    chunks = 2 * layout.context_ranks if layout.context_ranks > 1 else 1
    padded = [-(-n // chunks) * chunks for n in lengths]
    missing = -sum(padded) % math.lcm(chunks, layout.context_ranks * layout.multiple)
    return ([*lengths, 0], [*padded, missing]) if missing else (lengths, padded)


def _zigzag(
    lengths: list[int], padded: list[int], layout: Layout
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(place in the row without padding or -1, position, rank) of each token of the padded row."""
    lengths_S, padded_S = torch.tensor(lengths), torch.tensor(padded)
    sequence_P = torch.repeat_interleave(torch.arange(len(padded)), padded_S)
    positions_P = torch.arange(len(sequence_P)) - (padded_S.cumsum(0) - padded_S)[sequence_P]
    source_P = (lengths_S.cumsum(0) - lengths_S)[sequence_P] + positions_P
    source_P = source_P.masked_fill(positions_P >= lengths_S[sequence_P], -1)
    if layout.context_ranks == 1:
        return source_P, positions_P, torch.zeros_like(positions_P)
    chunks = 2 * layout.context_ranks
    chunk_P = positions_P * chunks // padded_S[sequence_P]
    return source_P, positions_P, torch.minimum(chunk_P, chunks - 1 - chunk_P)


def _length_groups(
    padded: list[int], positions_T: torch.Tensor, gathered_P: torch.Tensor, context_ranks: int
) -> tuple[LengthGroup, ...]:
    """Group by powers of two, so that less than half of a block is padding."""
    by_size: dict[int, list[tuple[int, int]]] = {}
    start = 0
    for n in padded:
        by_size.setdefault((n - 1).bit_length(), []).append((start, n))
        start += n
    return tuple(
        _group(torch.tensor(rows), positions_T, gathered_P, context_ranks)
        for _, rows in sorted(by_size.items())
    )


def _group(
    rows: torch.Tensor, positions_T: torch.Tensor, gathered_P: torch.Tensor, context_ranks: int
) -> LengthGroup:
    """``rows`` [B, 2]: start and length of each sequence in the padded row."""
    real_BL, row_BL = _block(rows)
    keys_BL = torch.where(real_BL, gathered_P[row_BL], 0)
    # Of every sequence a rank holds the same share, one after the other.
    asked_BQ, queries_BQ = _block(rows // context_ranks)
    seen_BQL = None
    if context_ranks > 1:
        # A padded query sees key 0 at least: a softmax over nothing would be NaN.
        seen_BQL = torch.arange(keys_BL.shape[1]) <= positions_T[queries_BQ][..., None]
    kept_N = asked_BQ.flatten().nonzero().flatten()
    return LengthGroup(queries_BQ, keys_BL, seen_BQL, kept_N, queries_BQ.flatten()[kept_N])


def _block(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(which places of the padded block are real, their tokens or 0), both [B, longest]."""
    starts_B, lengths_B = rows.unbind(1)
    column_L = torch.arange(int(lengths_B.max()))
    real_BL = column_L < lengths_B[:, None]
    return real_BL, torch.where(real_BL, starts_B[:, None] + column_L, 0)


def _to(group: LengthGroup, device: str) -> LengthGroup:
    return LengthGroup(
        group.queries_BQ.to(device),
        group.keys_BL.to(device),
        None if group.seen_BQL is None else group.seen_BQL.to(device),
        group.kept_N.to(device),
        group.tokens_N.to(device),
    )


class PackedRotaryEmbedding(torch.nn.Module):
    """megatron-core's rotary embedding, taken at the packed tokens' own positions."""

    def __init__(self, inner: RotaryEmbedding) -> None:
        super().__init__()
        self.inner = inner

    def get_rotary_seq_len(
        self, context: Any, decoder: Any, decoder_input: Any, config: Any, packed: Any
    ) -> PackedSequences:
        """megatron-core passes on what this returns to :meth:`forward`: the packed row itself."""
        if not isinstance(packed, PackedSequences):
            raise TypeError(f"the model takes packed sequences, got {type(packed).__name__}")
        return packed

    def forward(self, packed: PackedSequences, **_: Any) -> torch.Tensor:
        """Angles ``[T, 1, 1, head size]`` of the row's tokens."""
        return self.inner.get_emb(int(packed.max_seqlen_q))[packed.positions_T]


class PackedAttention(MegatronModule):
    """Causal attention inside each packed sequence; grouped queries; the ``core_attention`` slot."""

    def __init__(
        self,
        config: Any,
        layer_number: int,
        attn_mask_type: Any,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: Any = None,
    ) -> None:
        super().__init__(config)
        self.scale = softmax_scale
        self.context = pg_collection.cp if pg_collection is not None else None

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        attn_mask_type: Any = None,
        attention_bias: torch.Tensor | None = None,
        packed_seq_params: PackedSequences | None = None,
    ) -> torch.Tensor:
        """``query [T, 1, heads, size]``, ``key`` and ``value [T, 1, groups, size]`` -> ``[T, 1, heads * size]``."""
        assert isinstance(packed_seq_params, PackedSequences)
        q, k, v = query.squeeze(1), key.squeeze(1), value.squeeze(1)
        if self.config.context_parallel_size > 1:
            k, v = self._gathered(k), self._gathered(v)
        attend = _attend_in_blocks if packed_seq_params.groups else _attend_with_flash
        out = attend(q, k, v, packed_seq_params, self.scale)
        return out.reshape(out.shape[0], 1, -1)

    def _gathered(self, part: torch.Tensor) -> torch.Tensor:
        """The context ranks' tokens one after the other; gradients go back summed."""
        return gather_from_sequence_parallel_region(
            part.contiguous(), tensor_parallel_output_grad=True, group=self.context
        )


def _attend_in_blocks(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, packed: PackedSequences, scale: float | None
) -> torch.Tensor:
    """Each length group as one padded call; causal, so padding on the right reaches no token."""
    outputs: list[torch.Tensor] = []
    for group in packed.groups:
        q_BhQd = _rows(q, group.queries_BQ)
        k_BhLd, v_BhLd = _rows(k, group.keys_BL), _rows(v, group.keys_BL)
        seen = group.seen_BQL
        out = F.scaled_dot_product_attention(
            q_BhQd,
            k_BhLd,
            v_BhLd,
            attn_mask=None if seen is None else seen[:, None],
            is_causal=seen is None,
            scale=scale,
            enable_gqa=True,
        )
        outputs.append(out.transpose(1, 2).flatten(0, 1).index_select(0, group.kept_N))
    return torch.cat(outputs).index_select(0, packed.unpack_T)


def _rows(x: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """``[tokens, heads, size]`` at ``places [B, L]``: ``[B, heads, L, size]``."""
    return x.index_select(0, places.flatten()).unflatten(0, places.shape).transpose(1, 2)


def _attend_with_flash(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, packed: PackedSequences, scale: float | None
) -> torch.Tensor:
    from torch.nn.attention.varlen import varlen_attn

    borders, longest = packed.cu_seqlens_q, packed.max_seqlen_q
    causal = {"window_size": (-1, 0), "scale": scale, **_grouped_queries()}
    out = varlen_attn(q, k, v, borders, borders, longest, longest, **causal)
    assert isinstance(out, torch.Tensor)
    return out


@functools.cache
def _grouped_queries() -> dict[str, Any]:
    """Newer releases of PyTorch ask for a word; older ones take fewer keys than queries without."""
    from torch.nn.attention.varlen import varlen_attn

    known = inspect.signature(varlen_attn).parameters
    return {"enable_gqa": True} if "enable_gqa" in known else {}
