"""The arrangement of codes in the 64-bit words of QuIP#'s published checkpoints.

A word of E8P codes holds four of them: the index of the absolute vector of code i is byte i of the low half, and its sign
bit j is bit ``4 j + i`` of the high half. Words and the codes inside of them follow the tiles of a tensor-core product:
word ``((t · in/64 + u) · 8 + a) · 4 + b``, counted through the whole tensor, has as its code ``i = 2 c + r`` the one for row
``16 t + 2 a + r`` and columns ``64 u + 16 b + 8 c`` to ``+ 7``. So out is a multiple of 16, and in one of 64.

Halves and bytes of words are taken as a little-endian machine has them.
"""

from __future__ import annotations

import torch
from torch import Tensor

CODE = 8
"""Weights in a code."""

OUT_MULTIPLE, IN_MULTIPLE = 16, 64


def unpack(words: Tensor, bits: int) -> tuple[Tensor, Tensor | None]:
    """What ``Qidxs`` holds.

    Args:
        words: int64 ``[out, in · bits / 64]``: the words of E8P codes, then those of the residual's.
        bits: 2, 3 or 4.

    Returns:
        the codes, int16 ``[out, in / 8]``, the bits of unsigned codes, in the order of rows and columns; and those of the residual:
        None at 2 bits, uint8 ``[out, in / 8]`` at 3, as the codes at 4.
    """
    columns = words.shape[1] * 2 // bits  # words that the codes of two bits take in each row
    first, second = words[:, :columns], words[:, columns:]
    if bits == 2:
        return unpack_e8p(first), None
    return unpack_e8p(first), unpack_bytes(second) if bits == 3 else unpack_e8p(second)


def unpack_e8p(words: Tensor) -> Tensor:
    """Words, int64 ``[out, in / 32]``, to E8P codes, int16 ``[out, in / 8]``, the bits of ``(a << 8) | s``."""
    out_features, in_features = words.shape[0], 32 * words.shape[1]
    T, U = out_features // OUT_MULTIPLE, in_features // IN_MULTIPLE
    halves = words.reshape(-1).view(torch.int32).view(T, U, 8, 4, 2)  # [t, u, a, b, low and high]
    absolute, signs = halves.unbind(-1)
    codes = torch.empty(T, 8, 2, U, 4, 2, dtype=torch.int16)  # [t, a, r, u, b, c]
    for i in range(4):
        code = (absolute >> 8 * i & 0xFF) << 8 | _every_fourth_bit(signs >> i)
        codes[:, :, i % 2, :, :, i // 2] = code.permute(0, 2, 1, 3).to(
            torch.int16
        )  # wraps: 65535 is -1
    return codes.view(out_features, in_features // CODE)


def unpack_bytes(words: Tensor) -> Tensor:
    """Words, int64 ``[out, in / 64]``, to codes of a byte, uint8 ``[out, in / 8]``: byte k of word w is code ``8 w + k``."""
    return words.contiguous().view(torch.uint8)


def _every_fourth_bit(x: Tensor) -> Tensor:
    """Bits 0, 4, … 28 of int32s as bits 0 to 7."""
    x = x & 0x11111111
    x = (x | x >> 3) & 0x03030303
    x = (x | x >> 6) & 0x000F000F
    return (x | x >> 12) & 0xFF
