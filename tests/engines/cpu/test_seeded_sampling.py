"""The hash behind seeded sampling, against MurmurHash3 written for one value at a time."""

import struct

import torch
from hypothesis import given
from hypothesis import strategies as st

from rollflow.engines.cpu.seeded_sampling import murmur_hash32

WORD = 0xFFFFFFFF


def murmur3(data: bytes) -> int:
    def rotate(x: int, bits: int) -> int:
        return ((x << bits) | (x >> (32 - bits))) & WORD

    h = 0
    for (k,) in struct.iter_unpack("<I", data):
        h ^= rotate(k * 0xCC9E2D51 & WORD, 15) * 0x1B873593 & WORD
        h = (rotate(h, 13) * 5 + 0xE6546B64) & WORD
    h ^= len(data)
    h = (h ^ (h >> 16)) * 0x85EBCA6B & WORD
    h = (h ^ (h >> 13)) * 0xC2B2AE35 & WORD
    return h ^ (h >> 16)


def test_the_reference_knows_a_published_value():
    assert murmur3(b"test") == 0xBA6BD213


@given(
    rows=st.lists(st.tuples(st.integers(0, 2**63 - 1), st.integers(0, 2**31 - 1)), min_size=1),
    columns=st.integers(1, 9),
)
def test_every_value_is_murmurhash3_of_seed_position_and_column(
    rows: list[tuple[int, int]], columns: int
):
    seeds, positions = (torch.tensor(column) for column in zip(*rows, strict=True))
    found = murmur_hash32(seeds.to(torch.uint64), positions, torch.arange(columns))
    expected = [[murmur3(struct.pack("<QII", s, p, c)) for c in range(columns)] for s, p in rows]
    assert found.dtype == torch.uint32
    assert found.tolist() == expected
