"""Packed attention is attention inside each sequence, forward and backward."""

import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from rollflow.engines.megatron.attention import Layout, _attend_in_blocks, pack


def one_by_one(q, k, v, lengths):
    outputs, start = [], 0
    for n in lengths:
        q1, k1, v1 = (x[start : start + n].transpose(0, 1)[None] for x in (q, k, v))
        out = F.scaled_dot_product_attention(q1, k1, v1, is_causal=True, enable_gqa=True)
        outputs.append(out[0].transpose(0, 1))
        start += n
    return torch.cat(outputs)


@settings(max_examples=25, deadline=None)
@given(lengths=st.lists(st.integers(1, 40), min_size=1, max_size=12), seed=st.integers(0, 99))
def test_packed_attention_equals_one_call_for_each_sequence(lengths, seed):
    torch.manual_seed(seed)
    total = sum(lengths)
    shapes = [(total, 4, 8), (total, 2, 8), (total, 2, 8)]
    ours = [torch.randn(s, requires_grad=True) for s in shapes]
    theirs = [x.detach().clone().requires_grad_() for x in ours]
    weight = torch.randn(total, 4, 8)
    q, k, v = ours
    found = _attend_in_blocks(q, k, v, pack(lengths), None)
    expected = one_by_one(theirs[0], theirs[1], theirs[2], lengths)
    (found * weight).sum().backward()
    (expected * weight).sum().backward()
    assert torch.allclose(found, expected, atol=2e-6)
    for a, b in zip(ours, theirs, strict=True):
        assert a.grad is not None
        assert b.grad is not None
        assert torch.allclose(a.grad, b.grad, atol=1e-5)


def test_less_than_half_of_a_padded_block_is_padding():
    lengths = [1, 2, 3, 4, 5, 8, 9, 16, 17, 33, 64]
    packed = pack(lengths)
    for group in packed.groups:
        assert group.kept_N.numel() * 2 > group.keys_BL.numel()
    assert sum(g.kept_N.numel() for g in packed.groups) == sum(lengths)


def test_positions_start_anew_in_each_sequence():
    assert pack([3, 1, 2]).positions_T.tolist() == [0, 1, 2, 0, 0, 1]


@settings(max_examples=50, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=9),
    context=st.sampled_from([1, 2, 3, 4]),
    multiple=st.sampled_from([1, 2, 4, 6]),
)
def test_context_ranks_hold_every_token_once_and_equally_many(lengths, context, multiple):
    parts = [pack(lengths, layout=Layout(context, rank, multiple)) for rank in range(context)]
    held = torch.cat([part.source_T for part in parts])
    assert sorted(held[held >= 0].tolist()) == list(range(sum(lengths)))
    assert len({len(part.source_T) for part in parts}) == 1
    assert len(parts[0].source_T) % multiple == 0
    for part in parts:
        real = part.source_T >= 0
        whole = pack(lengths).positions_T
        assert torch.equal(part.positions_T[real], whole[part.source_T[real]])


def test_context_ranks_share_the_work_of_causal_attention():
    parts = [pack([64] * 3, layout=Layout(4, rank)) for rank in range(4)]
    seen = {int(g.seen_BQL.sum()) for part in parts for g in part.groups if g.seen_BQL is not None}
    assert len(seen) == 1
