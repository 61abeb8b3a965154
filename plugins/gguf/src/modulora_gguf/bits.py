"""Take the fields of blocks apart: bytes, small codes, fp16 scales."""

from __future__ import annotations

import torch
from torch import Tensor


def split(b: Tensor, *sizes: int) -> tuple[Tensor, ...]:
    """Blocks, uint8 ``[n, bytes]``, as fields of so many bytes.

    Fields are copies: torch takes no part of one block as wider numbers, where it isn't aligned.
    """
    rows = torch.contiguous_format
    return tuple(field.clone(memory_format=rows) for field in b.split(list(sizes), dim=1))


def floats(codes: Tensor) -> Tensor:
    return codes.to(torch.float32)


def half(field: Tensor) -> Tensor:
    """The fp16 numbers of a field of bytes, as fp32; NaN and infinities, of damage, as 0."""
    numbers = field.view(torch.float16).to(torch.float32)
    return numbers.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)


def words(field: Tensor, nbytes: int) -> Tensor:
    """Whole numbers of 2 or 4 bytes, little-endian, as int64."""
    if nbytes == 2:
        return field.view(torch.int16).to(torch.int64) & 0xFFFF
    return field.view(torch.int32).to(torch.int64) & 0xFFFFFFFF


def bits(field: Tensor, width: int, run: int = 1) -> Tensor:
    """Codes of ``width`` bits, fp32 ``[n, codes]``: of each ``run`` of bytes all the lowest bits
    first, then all the next ones."""
    shifts = torch.arange(0, 8, width, device=field.device, dtype=torch.uint8)[:, None]
    codes = field.reshape(len(field), -1, 1, run) >> shifts & (1 << width) - 1
    return floats(codes.flatten(1))


def to_bytes(codes: Tensor, width: int, run: int = 1) -> Tensor:
    """Codes ``[n, codes]`` of any dtype in bytes, uint8: the inverse of :func:`bits`."""
    parts = codes.to(torch.uint8).view(len(codes), -1, 8 // width, run)
    shifts = torch.arange(0, 8, width, device=codes.device, dtype=torch.uint8)[:, None]
    return (parts << shifts).sum(2, dtype=torch.uint8).flatten(1)


def nibbles(field: Tensor, run: int) -> Tensor:
    """Codes of 4 bits; the order is the one of :func:`bits`."""
    return bits(field, 4, run)
