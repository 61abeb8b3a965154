"""Find scales of blocks that are NaN or infinite, a sign of a damaged file.

One byte of a scale is enough: fp16 numbers that aren't finite have an exponent of ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import reduce
from operator import or_
from typing import Any

import torch
from torch import Tensor

from modulora_core.errors import CheckpointError
from modulora_gguf import reference

_FP16 = 0x7C
"""The exponent of fp16, in its high byte."""

_FIRST: Mapping[int, int] = {1: _FP16}
_SCALES: Mapping[str, Mapping[int, int]] = {
    "Q4_1": {1: _FP16, 3: _FP16}, "Q5_1": {1: _FP16, 3: _FP16},
    "Q2_K": {81: _FP16, 83: _FP16}, "Q3_K": {109: _FP16}, "Q4_K": {1: _FP16, 3: _FP16},
    "Q5_K": {1: _FP16, 3: _FP16}, "Q6_K": {209: _FP16}, "TQ1_0": {53: _FP16}, "TQ2_0": {65: _FP16},
    "MXFP4": {0: 0xFF}, "NVFP4": dict.fromkeys(range(4), 0x7F),
}  # fmt: skip
"""Bytes of a block in which all bits of a mask are set if a scale is not finite; others: _FIRST."""


def check_scales(blocks: Tensor, kind: str, subject: str) -> None:
    """Refuse ``blocks``, uint8 ``[rows, row bytes]``, with a scale that is NaN or infinite.

    Raises:
        CheckpointError: there is one.
    """
    if blocks.is_meta or not blocks.numel():
        return
    if bool(damaged(blocks, kind).any()):
        raise CheckpointError(
            f"{subject}: expected finite scales of blocks, got NaN or Inf; download the file again"
        )


def damaged(blocks: Tensor, kind: str) -> Any:
    """Whether a scale is NaN or infinite, for each block of uint8 ``[rows, row bytes]``; on a CPU
    an array of NumPy, else a tensor.

    A number of BF16 is a scale of its own.
    """
    if kind == "BF16":
        return (blocks.contiguous().view(torch.int16) & 0x7F80) == 0x7F80
    b: Any = blocks.reshape(-1, reference.block_of(kind)[1])
    if b.device.type == "cpu":
        b = b.numpy()  # takes bytes out of blocks in half of torch's time
    if kind == "IQ1_M":  # four words hold four bits of d each
        return ((b[:, 55] & 0x70) == 0x70) & ((b[:, 53] & 0xC0) == 0xC0)
    found = [(b[:, at] & mask) == mask for at, mask in _SCALES.get(kind, _FIRST).items()]
    return reduce(or_, found)
