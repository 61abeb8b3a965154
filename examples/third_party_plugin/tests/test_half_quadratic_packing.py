"""Codes of every width take as many bits as they have: nothing is lost or padded except plane
ends."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from modulora_half_quadratic import packing

WIDTHS = {1: [1], 2: [2], 3: [2, 1], 4: [4], 5: [4, 1], 6: [4, 2], 7: [4, 2, 1], 8: [8]}


def bit_by_bit(codes, bits):
    """The bytes of a row as packing.py's docstring draws them, a bit at a time."""
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


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 8), st.data())
def test_bytes_have_the_documented_layout_and_unpack_to_the_codes(bits, data):
    codes = data.draw(st.lists(st.integers(0, 2**bits - 1), min_size=1, max_size=70))
    rows = torch.tensor([codes, codes], dtype=torch.uint8)
    packed = packing.pack(rows, bits)
    assert bytes(packed[1].tolist()) == bit_by_bit(codes, bits)
    assert torch.equal(packing.unpack(packed, bits, len(codes)), rows)
