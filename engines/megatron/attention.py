"""Attention and rotary positions over packed sequences, without a Python loop over sequences.

Sequences are laid end to end, ``T`` tokens in one row (the thd idea: no padding between them).
megatron-core's local attention refuses that and its rotary embedding loops over sequences, so both
are given here: positions are gathered once per forward, and attention groups sequences of similar
length into padded calls on a CPU, or calls PyTorch's variable-length flash kernel on a GPU.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.module import MegatronModule


@dataclass(frozen=True, slots=True)
class LengthGroup:
    """Sequences of similar length as rows of one padded block."""

    gather_BL: torch.Tensor
    """Packed token behind each place of the block; padding repeats token 0."""
    kept_N: torch.Tensor
    """Places of the flattened block that are not padding, in packed order of ``tokens_N``."""
    tokens_N: torch.Tensor
    """Packed token of each kept place."""


@dataclass
class PackedSequences(PackedSeqParams):
    """One row of packed sequences as every layer sees it.

    The format is sbhd with a batch of one, so megatron-core applies rotary positions elementwise
    to what :class:`PackedRotaryEmbedding` gathered; ``cu_seqlens_q`` has the borders.
    """

    positions_T: torch.Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.long))
    """Position of each token in its own sequence."""
    groups: tuple[LengthGroup, ...] = ()
    """How the CPU lays the sequences out for attention; empty on a GPU."""
    unpack_T: torch.Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.long))
    """Where token t stands in the concatenation of the groups' ``tokens_N``."""


def pack(lengths: list[int], device: str = "cpu") -> PackedSequences:
    """Describe sequences of ``lengths`` tokens laid end to end."""
    borders = torch.tensor([0, *lengths]).cumsum(0)
    positions = torch.cat([torch.arange(n) for n in lengths])
    groups = _length_groups(lengths, borders.tolist()) if device == "cpu" else ()
    order = torch.cat([g.tokens_N for g in groups]) if groups else torch.empty(0, dtype=torch.long)
    borders = borders.to(device=device, dtype=torch.int32)
    return PackedSequences(
        qkv_format="sbhd",
        cu_seqlens_q=borders,
        cu_seqlens_kv=borders,
        max_seqlen_q=max(lengths),
        max_seqlen_kv=max(lengths),
        positions_T=positions.to(device),
        groups=groups,
        unpack_T=order.argsort(),
    )


def _length_groups(lengths: list[int], borders: list[int]) -> tuple[LengthGroup, ...]:
    """Group by powers of two, so that less than half of a block is padding."""
    by_size: dict[int, list[int]] = {}
    for i, n in enumerate(lengths):
        by_size.setdefault((n - 1).bit_length(), []).append(i)
    groups: list[LengthGroup] = []
    for _, rows in sorted(by_size.items()):
        lengths_B = torch.tensor([lengths[i] for i in rows])
        starts_B = torch.tensor([borders[i] for i in rows])
        column_L = torch.arange(int(lengths_B.max()))
        real_BL = column_L < lengths_B[:, None]
        gather_BL = torch.where(real_BL, starts_B[:, None] + column_L, 0)
        kept_N = real_BL.flatten().nonzero().flatten()
        groups.append(LengthGroup(gather_BL, kept_N, gather_BL.flatten()[kept_N]))
    return tuple(groups)


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
        attend = _attend_on_gpu if query.is_cuda else _attend_on_cpu
        out = attend(query[:, 0], key[:, 0], value[:, 0], packed_seq_params, self.scale)
        return out.reshape(out.shape[0], 1, -1)


def _attend_on_cpu(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, packed: PackedSequences, scale: float | None
) -> torch.Tensor:
    """Each length group as one padded call; causal, so padding on the right reaches no token."""
    outputs: list[torch.Tensor] = []
    for group in packed.groups:
        q_BhLd, k_BhLd, v_BhLd = (
            x.index_select(0, group.gather_BL.flatten())
            .unflatten(0, group.gather_BL.shape)
            .transpose(1, 2)
            for x in (q, k, v)
        )
        out = F.scaled_dot_product_attention(
            q_BhLd, k_BhLd, v_BhLd, is_causal=True, scale=scale, enable_gqa=True
        )
        outputs.append(out.transpose(1, 2).flatten(0, 1).index_select(0, group.kept_N))
    return torch.cat(outputs).index_select(0, packed.unpack_T)


def _attend_on_gpu(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, packed: PackedSequences, scale: float | None
) -> torch.Tensor:
    from torch.nn.attention.varlen import varlen_attn

    repeat = q.shape[1] // k.shape[1]
    if repeat > 1:
        k, v = k.repeat_interleave(repeat, 1), v.repeat_interleave(repeat, 1)
    borders, longest = packed.cu_seqlens_q, packed.max_seqlen_q
    out = varlen_attn(q, k, v, borders, borders, longest, longest, window_size=(-1, 0), scale=scale)
    assert isinstance(out, torch.Tensor)
    return out
