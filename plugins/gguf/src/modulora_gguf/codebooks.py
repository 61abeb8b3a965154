"""The IQ types: codes are indices of tables of 4 or 8 weights, and signs are stored apart.

The tables are llama.cpp's. They are read from the ``gguf`` package, which has them as attributes of
a class for each type.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import gguf.quants
import numpy as np
import torch
from torch import Tensor

from modulora_gguf.bits import bits, floats, half, split, words

DELTA = 0.125
"""The shift of all values of a group of IQ1_S and IQ1_M, with a sign for each group."""


@cache
def _table(name: str, device: torch.device) -> Tensor:
    """Table of a type, fp32: ``[entries, weights]``, or ``[16]`` of single weights."""
    kind: Any = getattr(gguf.quants, name)
    if hasattr(kind, "kvalues"):
        return torch.tensor(kind.kvalues, dtype=torch.float32, device=device)
    kind.init_grid()
    return torch.from_numpy(np.array(kind.grid)).reshape(kind.grid_shape).to(device)


@cache
def _signs(device: torch.device) -> Tensor:
    """Bytes of eight signs, the last of which makes the number of minus signs even: ``[128]``."""
    stored = np.frombuffer(gguf.quants.IQ2_XXS.ksigns, dtype=np.uint8).copy()
    return torch.from_numpy(stored).to(device)


def lookup(name: str, codes: Tensor) -> Tensor:
    """The table's entries at whole numbers ``codes``, of any dtype: ``[*codes.shape, ...]``."""
    return _table(name, codes.device)[codes.to(torch.int64)]


def _plus_minus(signs: Tensor) -> Tensor:
    """1 or −1 of every bit of bytes ``[n, bytes]``: ``[n, 8 · bytes]``."""
    return 1 - 2 * bits(signs, 1)


def _shared_signs(word: Tensor) -> Tensor:
    """Signs of 32 weights from the four 7-bit indices of each number of ``word`` ``[n, 8]``."""
    shifts = torch.arange(0, 28, 7, device=word.device)
    return _plus_minus(_signs(word.device)[word[:, :, None] >> shifts & 127].flatten(1))


def _scaled(d: Tensor, values: Tensor, signs: Tensor) -> Tensor:
    """``d``, ``[n, parts]``, times weights and signs, ``[n, 256]``."""
    n, parts = d.shape
    scaled = d[:, :, None] * values.reshape(n, parts, -1)
    return (scaled * signs.reshape(n, parts, -1)).flatten(1)


def iq2_xxs(b: Tensor) -> Tensor:
    d, qs = split(b, 2, 64)
    pairs = qs.view(-1, 8, 8)
    word = words(pairs[:, :, 4:].contiguous(), 4).flatten(1)  # signs, and a scale in the top bits
    db = half(d) * (0.5 + floats(word >> 28)) * 0.25
    return _scaled(db, lookup("IQ2_XXS", pairs[:, :, :4]), _shared_signs(word))


def iq2_xs(b: Tensor) -> Tensor:
    d, qs, scales = split(b, 2, 64, 8)
    word = words(qs, 2)
    db = half(d) * (0.5 + bits(scales, 4)) * 0.25
    return _scaled(db, lookup("IQ2_XS", word & 511), _plus_minus(_signs(b.device)[word >> 9]))


def iq2_s(b: Tensor) -> Tensor:
    d, qs, signs, qh, scales = split(b, 2, 32, 32, 8, 8)
    db = half(d) * (0.5 + bits(scales, 4)) * 0.25
    return _scaled(db, lookup("IQ2_S", floats(qs) + 256 * bits(qh, 2)), _plus_minus(signs))


def iq3_xxs(b: Tensor) -> Tensor:
    d, qs, scales = split(b, 2, 64, 32)
    word = words(scales, 4)
    db = half(d) * (0.5 + floats(word >> 28)) * 0.5
    return _scaled(db, lookup("IQ3_XXS", qs), _shared_signs(word))


def iq3_s(b: Tensor) -> Tensor:
    d, qs, qh, signs, scales = split(b, 2, 64, 8, 32, 4)
    db = half(d) * (1 + 2 * bits(scales, 4))
    return _scaled(db, lookup("IQ3_S", floats(qs) + 256 * bits(qh, 1)), _plus_minus(signs))


def _shifted(dl: Tensor, values: Tensor, minus: Tensor) -> Tensor:
    """``dl (value ± DELTA)``: ``[n, parts, 1]`` of both, and weights ``[n, 256]``."""
    delta = torch.where(minus, -DELTA, DELTA)
    n, parts = delta.shape[:2]
    return (dl * (values.reshape(n, parts, -1) + delta)).flatten(1)


def iq1_s(b: Tensor) -> Tensor:
    d, qs, qh = split(b, 2, 32, 16)
    word = words(qh, 2)
    dl = half(d) * floats(2 * (word >> 12 & 7) + 1)
    high = word[:, :, None] >> torch.arange(0, 12, 3, device=b.device) & 7
    values = lookup("IQ1_S", qs.to(torch.int64) + 256 * high.flatten(1))
    return _shifted(dl[:, :, None], values, (word >= 0x8000)[:, :, None])


def iq1_m(b: Tensor) -> Tensor:
    """The bits of d are the top four of each of the four words of scales."""
    qs, qh, scales = split(b, 32, 16, 8)
    word = words(scales, 2)
    d = ((word & 0xF000) >> torch.tensor([12, 8, 4, 0], device=b.device)).sum(dim=1)
    d = half(d.to(torch.int32).view(torch.uint8).view(-1, 4)[:, :2].contiguous())
    sc = (word[:, :, None] >> torch.arange(0, 12, 3, device=b.device) & 7).flatten(1)
    dl = (d * floats(2 * sc + 1)).repeat_interleave(2, dim=1)  # of 16 weights → of 8
    high = bits(qh, 4).to(torch.int64)
    values = lookup("IQ1_S", qs.to(torch.int64) + 256 * (high & 7))
    return _shifted(dl[:, :, None], values, (high >= 8)[:, :, None])
