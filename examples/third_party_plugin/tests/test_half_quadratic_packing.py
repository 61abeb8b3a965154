"""Codes of every width in as many bits as they have: nothing is lost, nothing is padded but the end of a plane."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from modulora_half_quadratic import packing

WIDTHS = {1: [1], 2: [2], 3: [2, 1], 4: [4], 5: [4, 1], 6: [4, 2], 7: [4, 2, 1], 8: [8]}


def bit_by_bit(codes: list[int], bits: int) -> bytes:
    """The bytes of one row as packing.py's docstring draws them, a bit at a time."""
    packed, low = bytearray(), 0
    for width in WIDTHS[bits]:
        line = -(-len(codes) * width // 8)
        plane = bytearray(line)
        for i, code in enumerate(codes):
            for bit in range(width):
                plane[i % line] |= (code >> (low + bit) & 1) << (i // line * width + bit)
        packed += plane
        low += width
    return bytes(packed)


@settings(max_examples=150, deadline=None)
@given(st.integers(1, 8), st.integers(0, 4), st.integers(0, 90), st.integers(0, 2**32 - 1))
def test_unpacking_gives_the_codes_again(bits, rows, n, seed):
    codes = torch.randint(
        0, 2**bits, (rows, n), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)
    )
    packed = packing.pack(codes, bits)
    assert packed.dtype == torch.uint8
    assert packed.shape == (rows, packing.row_bytes(n, bits))
    assert torch.equal(packing.unpack(packed, bits, n), codes)


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 8), st.data())
def test_bytes_are_those_of_the_documented_layout(bits, data):
    codes = data.draw(st.lists(st.integers(0, 2**bits - 1), min_size=1, max_size=70))
    packed = packing.pack(torch.tensor([codes], dtype=torch.uint8), bits)
    assert bytes(packed[0].tolist()) == bit_by_bit(codes, bits)


def test_the_documented_example_is_what_is_packed():
    c = torch.randint(0, 4, (10,), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    expected = [
        c[0] | c[3] << 2 | c[6] << 4 | c[9] << 6,
        c[1] | c[4] << 2 | c[7] << 4,
        c[2] | c[5] << 2 | c[8] << 4,
    ]
    assert packing.pack(c[None], 2).tolist() == [[int(byte) for byte in expected]]


@pytest.mark.parametrize("bits", range(1, 9))
def test_a_row_takes_its_bits_and_less_than_a_byte_more_for_each_plane(bits):
    assert list(packing.widths(bits)) == WIDTHS[bits]
    for n in range(200):
        spare = packing.row_bytes(n, bits) - n * bits / 8
        assert 0 <= spare < len(WIDTHS[bits])
        assert n % 8 or spare == 0
