"""Two 4-bit codes in a byte: ``byte = (even element << 4) | odd element``."""

from __future__ import annotations

import torch
from torch import Tensor

from modulora_nf4.reference import ZERO


def pack(q: Tensor) -> Tensor:
    """Codes, uint8 ``[numel]``, to bytes; the code of zero fills an odd number."""
    if q.numel() % 2:
        q = torch.nn.functional.pad(q, (0, 1), value=ZERO)
    return (q[0::2] << 4) | q[1::2]


def unpack(codes: Tensor, start: int, stop: int) -> Tensor:
    """The codes of elements ``[start, stop)``, uint8. ``start`` may be in the middle of a byte."""
    wanted = codes[start // 2 : (stop + 1) // 2]
    both = torch.stack([wanted >> 4, wanted & 0xF], dim=1).reshape(-1)
    return both[start % 2 :][: stop - start]
