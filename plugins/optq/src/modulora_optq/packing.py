"""Arrange the bits of codes: a row of n codes of b bits takes b · n / 8 bytes.

A *plane* holds w bits of each code of a row, w = 1, 2, 4 or 8. It cuts the n codes into 8 / w
consecutive *parts* of ⌈n · w / 8⌉ codes. All parts share the same bytes, each at bits of its own:
code i is in byte ``i % part``, from bit ``w · (i // part)`` on::

    w = 4, n = 6        byte 0       byte 1       byte 2        part 0: codes 0 1 2, low nibbles
                       (c3 | c0)    (c4 | c1)    (c5 | c2)      part 1: codes 3 4 5, high nibbles

Consecutive codes are therefore in consecutive bytes, at the same bits. A processor unpacks as many
as a register has bytes, with one shift. 2, 4 and 8 bits take one plane. 3 bits take a plane of the
low two bits, and after it a plane of the high bit. A short last part is filled with zeros.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import torch
from torch import Tensor

PLANES: Mapping[int, tuple[int, ...]] = MappingProxyType({2: (2,), 3: (2, 1), 4: (4,), 8: (8,)})
"""The widths w of the planes of b-bit codes, low bits first."""


def row_bytes(n: int, bits: int) -> int:
    """The bytes of a row of ``n`` codes."""
    return sum(plane_bytes(n, width) for width in PLANES[bits])


def plane_bytes(n: int, width: int) -> int:
    """The bytes of a plane of ``n`` codes, which is the length of its parts."""
    return -(-n * width // 8)


def pack(codes: Tensor, bits: int) -> Tensor:
    """Codes, uint8 ``[rows, n]`` below 2^bits, to bytes, uint8 ``[rows, row_bytes(n, bits)]``."""
    planes, low = [], 0
    for width in PLANES[bits]:
        planes.append(_pack_plane((codes >> low) & (2**width - 1), width))
        low += width
    return torch.cat(planes, dim=1)


def unpack(packed: Tensor, bits: int, n: int) -> Tensor:
    """Bytes, uint8 ``[rows, row_bytes(n, bits)]``, to codes, uint8 ``[rows, n]``."""
    codes = torch.zeros(packed.shape[0], n, dtype=torch.uint8, device=packed.device)
    begin, low = 0, 0
    for width in PLANES[bits]:
        end = begin + plane_bytes(n, width)
        codes |= _unpack_plane(packed[:, begin:end], width, n) << low
        begin, low = end, low + width
    return codes


def _shifts(width: int, device: torch.device) -> Tensor:
    """The first bit of each part, uint8 ``[parts, 1]``."""
    return torch.arange(0, 8, width, dtype=torch.uint8, device=device).unsqueeze(1)


def _pack_plane(values: Tensor, width: int) -> Tensor:
    rows, n = values.shape
    parts, part = 8 // width, plane_bytes(n, width)
    padded = torch.nn.functional.pad(values, (0, parts * part - n)).view(rows, parts, part)
    # no bit is in two parts, so that the sum is an or
    return (padded << _shifts(width, values.device)).sum(dim=1, dtype=torch.uint8)


def _unpack_plane(plane: Tensor, width: int, n: int) -> Tensor:
    shifted = plane.unsqueeze(1) >> _shifts(width, plane.device)  # [rows, parts, part]
    parts: Tensor = shifted & (2**width - 1)
    return parts.reshape(plane.shape[0], 8 // width * plane.shape[1])[:, :n]
