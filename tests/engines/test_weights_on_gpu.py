"""The sums by which weights on a GPU are known, computed here on a CPU."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rollflow.engines import weights_on_gpu
from rollflow.engines.checksums import Tally, tally_of, weights_digest
from rollflow.engines.weights_on_gpu import KIND, GpuTally, word_sum

MASK = (1 << 64) - 1


def by_hand(words):
    """The definition in Python's own numbers: shifts keep the sign, products are modulo 2^64."""

    def signed(x):
        x &= MASK
        return x - (1 << 64) if x >> 63 else x

    total = 0
    for place, word in enumerate(words, 1):
        key = signed(place * weights_on_gpu.KEY_STEP)
        key = signed((key ^ (key >> 32)) * weights_on_gpu.KEY_MIX)
        key = (key ^ (key >> 29)) | 1
        total = signed(total + key * word)
    return total


@given(st.lists(st.integers(-(2**31), 2**31 - 1), max_size=40))
def test_a_word_sum_is_what_its_definition_says(words):
    assert int(word_sum(torch.tensor(words, dtype=torch.int32))) == by_hand(words)


def test_a_word_sum_does_not_depend_on_how_it_is_cut(monkeypatch):
    tensor = torch.randn(1000)
    whole = int(word_sum(tensor))
    monkeypatch.setattr(weights_on_gpu, "CHUNK_WORDS", 7)
    assert int(word_sum(tensor)) == whole


@given(st.integers(0, 10**6), st.integers(1, 50))
def test_every_changed_word_changes_the_sum(seed, size):
    draw = np.random.default_rng(seed)
    words = torch.from_numpy(draw.integers(-(2**31), 2**31, size, dtype=np.int32))
    other = words.clone()
    other[draw.integers(size)] ^= int(draw.integers(1, 2**31))
    assert int(word_sum(words)) != int(word_sum(other))


def test_an_odd_number_of_bytes_counts_as_if_zeros_followed():
    tensor = torch.tensor([1, 2, 3, 4, 5], dtype=torch.uint8)
    padded = torch.tensor([1, 2, 3, 4, 5, 0, 0, 0], dtype=torch.uint8)
    assert int(word_sum(tensor)) == int(word_sum(padded))


def test_a_digest_of_one_kind_can_be_asked_for_where_the_other_is_usual():
    named = [("model.norm.weight", torch.randn(8)), ("lm_head.weight", torch.randn(4, 8))]
    plain = weights_digest(named)
    sums = weights_digest(named, like=KIND + "00")
    assert not plain.startswith(KIND)
    assert sums.startswith(KIND)
    assert weights_digest(named[::-1], like=sums) == sums
    assert weights_digest(named, like=plain) == plain
    assert isinstance(tally_of(named), Tally)


def test_parts_of_a_fused_weight_must_come_in_order():
    tally = GpuTally(for_servers=True)
    with pytest.raises(ValueError, match=r"k_proj.*as part 0 of.*qkv_proj"):
        tally.add("model.layers.0.self_attn.k_proj.weight", torch.randn(4, 8))


def test_what_a_tally_tells_does_not_depend_on_how_much_it_holds_at_a_time(monkeypatch):
    def told():
        torch.manual_seed(0)
        tally = GpuTally(for_servers=True)
        for part, rows in (("q", 8), ("k", 4), ("v", 4)):
            tally.add(f"model.layers.0.self_attn.{part}_proj.weight", torch.randn(rows, 16))
        tally.add("model.norm.weight", torch.randn(16))
        return tally.digest(), tally.server_checksums()

    at_once = told()
    monkeypatch.setattr(weights_on_gpu, "HELD_BYTES", 600)
    assert told() == at_once
    assert list(at_once[1]) == ["model.layers.0.self_attn.qkv_proj.weight", "model.norm.weight"]
