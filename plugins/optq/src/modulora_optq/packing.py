"""Dense bit streams: a row of b-bit codes in b/8 bytes a code, every row by itself.

A *plane* holds w bits of each code of a row, w a divisor of 8: its n codes are cut into 8/w consecutive parts of
⌈n·w/8⌉, and the parts lie over one another in the bits of the same bytes. Code i is in byte ``i % part``, from bit
``w · (i // part)`` on::

    w = 4, n = 6        byte 0       byte 1       byte 2            part 0: codes 0 1 2, low nibbles
                       (c3 | c0)    (c4 | c1)    (c5 | c2)          part 1: codes 3 4 5, high nibbles

Consecutive codes so stand in consecutive bytes at the same bits: a processor unpacks as many at once as its registers
have bytes, with one shift for all. 2, 4 and 8 bits are one plane. 3 bits are a plane of the low two bits and, after
it, a plane of the high bit. Where 8/w doesn't divide n, the last part is short and the bits of its missing codes
are zero, so that a row takes whole bytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import torch
from torch import Tensor

PLANES: Mapping[int, tuple[int, ...]] = MappingProxyType({2: (2,), 3: (2, 1), 4: (4,), 8: (8,)})
"""The widths w of the planes of b-bit codes, low bits first."""


def row_bytes(n: int, bits: int) -> int:
    """How many bytes a row of ``n`` codes takes: ``bits · n / 8``, each plane rounded up to whole bytes."""
    return sum(plane_bytes(n, width) for width in PLANES[bits])


def plane_bytes(n: int, width: int) -> int:
    """How many bytes ``width`` bits of each of ``n`` codes take: the length of a part of the plane."""
    return -(-n * width // 8)


def pack(codes: Tensor, bits: int) -> Tensor:
    """Codes, uint8 ``[rows, n]``, to bytes, uint8 ``[rows, row_bytes(n, bits)]``. Bits above ``bits`` are dropped."""
    planes, low = [], 0
    for width in PLANES[bits]:
        planes.append(_pack_plane((codes >> low) & (2**width - 1), width))
        low += width
    return torch.cat(planes, dim=1)


def unpack(packed: Tensor, bits: int, n: int) -> Tensor:
    """The codes, uint8 ``[rows, n]``, of bytes, uint8 ``[rows, row_bytes(n, bits)]``."""
    codes = torch.zeros(packed.shape[0], n, dtype=torch.uint8, device=packed.device)
    begin, low = 0, 0
    for width in PLANES[bits]:
        end = begin + plane_bytes(n, width)
        codes |= _unpack_plane(packed[:, begin:end], width, n) << low
        begin, low = end, low + width
    return codes


def _shifts(width: int, device: torch.device) -> Tensor:
    """From which bit on each part of a plane lies: uint8 ``[parts, 1]``."""
    return torch.arange(0, 8, width, dtype=torch.uint8, device=device).unsqueeze(1)


def _pack_plane(values: Tensor, width: int) -> Tensor:
    rows, n = values.shape
    parts, part = 8 // width, plane_bytes(n, width)
    padded = torch.nn.functional.pad(values, (0, parts * part - n)).view(rows, parts, part)
    return (padded << _shifts(width, values.device)).sum(
        dim=1, dtype=torch.uint8
    )  # no bit is in two parts


def _unpack_plane(plane: Tensor, width: int, n: int) -> Tensor:
    parts: Tensor = (plane.unsqueeze(1) >> _shifts(width, plane.device)) & (
        2**width - 1
    )  # [rows, parts, part]
    return parts.reshape(plane.shape[0], 8 // width * plane.shape[1])[:, :n]
