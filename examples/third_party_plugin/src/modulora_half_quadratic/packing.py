"""Packs codes of 1 to 8 bits without padding them.

A row of b-bit codes is cut into *planes*, one for each binary digit of b. For 5 bits they have 4
bits and 1 bit. The first plane holds the lowest bits of the codes, and the others follow it.

A plane of width w takes ⌈n · w / 8⌉ bytes for n codes. The codes form a table with 8 / w lines.
Each
column is one byte, with the first line in its lowest bits. Here w = 2, n = 10::

    line 0      c0  c1  c2         byte 0 = c0 | c3 << 2 | c6 << 4 | c9 << 6
    line 1      c3  c4  c5         byte 1 = c1 | c4 << 2 | c7 << 4
    line 2      c6  c7  c8         byte 2 = c2 | c5 << 2 | c8 << 4
    line 3      c9  -   -

One shift and one mask take a whole line out of consecutive bytes, which suits vector instructions.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad


def widths(bits: int) -> tuple[int, ...]:
    """The widths of the planes of b-bit codes, lowest bits first: 7 gives (4, 2, 1)."""
    return tuple(width for width in (8, 4, 2, 1) if bits & width)


def plane_bytes(n: int, width: int) -> int:
    """Bytes of a plane for ``n`` codes. Its lines have this length too."""
    return -(-n * width // 8)


def row_bytes(n: int, bits: int) -> int:
    """Bytes of a row of ``n`` codes: ``n · bits / 8``, each plane rounded up to whole bytes."""
    return sum(plane_bytes(n, width) for width in widths(bits))


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack codes below 2^bits, uint8 ``[rows, n]``, into uint8 ``[rows, row_bytes(n, bits)]``."""
    rows, n = codes.shape
    planes, low = [], 0
    for width in widths(bits):
        line = plane_bytes(n, width)
        digits = pad((codes >> low) & (2**width - 1), (0, 8 // width * line - n))
        table = digits.view(rows, 8 // width, line) << _shifts(width, codes.device)
        planes.append(table.sum(dim=1, dtype=torch.uint8))
        low += width
    return torch.cat(planes, dim=1)


def unpack(packed: Tensor, bits: int, n: int) -> Tensor:
    """Unpack uint8 ``[rows, row_bytes(n, bits)]`` to codes, uint8 ``[rows, n]``."""
    codes = torch.zeros(len(packed), n, dtype=torch.uint8, device=packed.device)
    begin, low = 0, 0
    for width in widths(bits):
        line = plane_bytes(n, width)
        plane = packed[:, None, begin : begin + line]  # [rows, 1, line]
        table = (plane >> _shifts(width, packed.device)) & (2**width - 1)  # [rows, 8 / width, line]
        codes |= table.flatten(1)[:, :n] << low
        begin, low = begin + line, low + width
    return codes


def _shifts(width: int, device: torch.device) -> Tensor:
    """The lowest bit of each line: uint8 ``[8 / width, 1]``."""
    return torch.arange(0, 8, width, dtype=torch.uint8, device=device)[:, None]
