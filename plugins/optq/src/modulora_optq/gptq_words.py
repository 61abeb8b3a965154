"""GPTQ files' arrangement of codes: one little-endian bit stream down each column, in 32-bit words.

Code i of a column has its lowest bit at bit ``bits · i`` of the column, and bit j is bit ``j % 32`` of word ``j // 32``.
So 2, 4 and 8-bit codes never cross a word, and 32 codes of 3 bits take three words. Everything here works on bytes, of
which a word has four, low byte first.
"""

from __future__ import annotations

import torch
from torch import Tensor

WORD_BITS = 32


def words_for(n: int, bits: int) -> int | None:
    """How many words ``n`` codes take; None where they don't fill whole words."""
    return None if n * bits % WORD_BITS else n * bits // WORD_BITS


def pack(codes: Tensor, bits: int) -> Tensor:
    """Codes, uint8 ``[n, m]``, to words, int32 ``[n · bits / 32, m]``. ``n · bits`` is a multiple of 32."""
    n, m = codes.shape
    if bits == 3:
        threes = torch.zeros(n // 8, m, dtype=torch.int32)  # eight codes in three bytes
        for i, part in enumerate(codes.view(n // 8, 8, m).unbind(1)):
            threes |= part.to(torch.int32) << bits * i
        data = torch.stack(
            [(threes >> shift & 0xFF).to(torch.uint8) for shift in (0, 8, 16)], dim=1
        )
    else:
        per = 8 // bits
        data = torch.zeros(n // per, m, dtype=torch.uint8)
        for i, part in enumerate(codes.view(n // per, per, m).unbind(1)):
            data |= part << bits * i
    # flat, since a dimension of one may have any stride, and a view as another dtype wants it to be 1
    return data.reshape(-1, 4, m).permute(0, 2, 1).reshape(-1).view(torch.int32).view(-1, m)


def unpack(words: Tensor, bits: int) -> Tensor:
    """The inverse of :func:`pack`: words, int32 ``[k, m]``, to codes, uint8 ``[32 k / bits, m]``."""
    k, m = words.shape
    data = words.reshape(-1).view(torch.uint8).view(k, m, 4).permute(0, 2, 1)  # [k, 4, m]
    mask = 2**bits - 1
    if bits == 3:
        low, mid, high = data.reshape(-1, 3, m).to(torch.int32).unbind(1)
        threes = low | mid << 8 | high << 16
        parts = [(threes >> bits * i & mask).to(torch.uint8) for i in range(8)]
    else:
        flat = data.reshape(-1, m)
        parts = [flat >> bits * i & mask for i in range(8 // bits)]
    return torch.stack(parts, dim=1).reshape(-1, m)


def add_one(words: Tensor, bits: int) -> Tensor:
    """Zeros, int32 words ``[rows, k]`` along rows, each plus one as GPTQModel adds it: the inverse of how it subtracts.

    For 2, 4 and 8 bits it works on whole words, where a 0 that became -1 borrowed from its neighbours; for 3 bits code by
    code, modulo 8.
    """
    if bits == 3:
        return pack((unpack(words.t(), bits) + 1) & 7, bits).t()
    ones = sum(1 << i for i in range(0, WORD_BITS, bits))
    return ((words.to(torch.int64) + ones) & 0xFFFFFFFF).to(torch.uint32).view(torch.int32)
