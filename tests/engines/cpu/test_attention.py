"""Attention of a CPU server, sequences of one length together, against SGLang's own loops."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from rollflow.engines.cpu import attention

ROOT = Path(__file__).parents[3]
SGLANG = """
from rollflow.engines.cpu import attention, sglang
sglang.install()
from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend as Backend
from tests.engines.cpu.test_attention import compare
own = Backend._run_sdpa_forward_extend, Backend._run_sdpa_forward_decode
attention.install()
compare(own, (Backend._run_sdpa_forward_extend, Backend._run_sdpa_forward_decode))
"""
SLOTS, HEADS, GROUPS, SIZE = 512, 4, 2, 8
HOW = {"scaling": SIZE**-0.5, "enable_gqa": True, "is_cross_attn": False}
PLAIN = {**HOW, "sliding_window_size": None}
LENGTHS = [6, 1, 9, 6, 7, 9, 6]
BEFORE = [0, 0, 3, 0, 6, 3, 5]


asked = []


def sglangs(*_, **how) -> torch.Tensor:
    asked.append(how)
    return torch.empty(0)


EXTEND, DECODE = attention.prefilling(sglangs), attention.decoding(sglangs)


def sequences(lengths, seed=0):
    """Caches, and of each sequence its slots in them, its row and its length."""
    draw = torch.Generator().manual_seed(seed)
    caches = [torch.randn(SLOTS, GROUPS, SIZE, generator=draw) for _ in range(2)]
    rows = len(lengths)
    slots = torch.randperm(SLOTS, generator=draw)[: rows * 16].view(rows, 16)
    return [*caches, slots, torch.randperm(rows, generator=draw), torch.tensor(lengths)]


def queries(tokens):
    return torch.randn(tokens, HEADS, SIZE, generator=torch.Generator().manual_seed(1))


def extended(way, before, **how):
    where = sequences(LENGTHS)
    new = where[-1] - torch.tensor(before)
    query = queries(int(new.sum()))
    return way(None, query, torch.empty_like(query), *where, torch.tensor(before), new, None, **how)


def decoded(way, where):
    query = queries(len(where[-1]))
    return way(None, query, torch.empty_like(query), *where, None, **PLAIN, causal=False)


def compare(own, ours):
    """Of SGLang's two loops and ours: equal to the last bit, up to rounding after a cached prefix."""
    assert ours[0].__module__ == ours[1].__module__ == attention.__name__
    first, cached = (
        [extended(way, before, **PLAIN, causal=True) for way in (own[0], ours[0])]
        for before in ([0] * len(LENGTHS), BEFORE)
    )
    assert torch.equal(*first)
    torch.testing.assert_close(*cached)
    assert torch.equal(*(decoded(way, sequences(LENGTHS)) for way in (own[1], ours[1])))


def test_prefill_and_decoding_give_what_sglang_gives():
    done = subprocess.run(
        [sys.executable, "-c", SGLANG], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr[-2000:]


def test_what_a_sequence_gets_does_not_depend_on_the_others():
    where = sequences(LENGTHS)
    among = decoded(DECODE, where)
    for i, query in enumerate(queries(len(LENGTHS)).split(1)):
        alone = [*where[:3], where[3][i : i + 1], where[4][i : i + 1]]
        one = DECODE(None, query, torch.empty_like(query), *alone, None, **PLAIN)
        assert torch.equal(one[0], among[i])


def test_long_sequences_are_gathered_in_parts(monkeypatch):
    whole = extended(EXTEND, [0] * len(LENGTHS), **PLAIN, causal=True)
    monkeypatch.setattr(attention, "TOKENS", 7)
    parts = attention.alike([(0, 3), (0, 3), (8, 1), (0, 3)])
    assert [rows.tolist() for _, rows in parts] == [[0, 1], [3], [2]]
    assert torch.equal(extended(EXTEND, [0] * len(LENGTHS), **PLAIN, causal=True), whole)


@pytest.mark.parametrize(
    "how",
    [
        {**PLAIN, "causal": False},
        {**PLAIN, "causal": True, "is_cross_attn": True},
        {**HOW, "causal": True, "sliding_window_size": 4},
    ],
)
def test_attention_that_is_not_plain_is_left_to_sglang(how):
    asked.clear()
    extended(EXTEND, BEFORE, **how)
    assert asked == [how]
