"""Pack rows of weights to a type of GGUF, and unpack them; types are called as in the file."""

from __future__ import annotations

import torch
from torch import Tensor

from modulora_core.errors import OptionError
from modulora_gguf import packing, reference
from modulora_gguf.quantizer import GGUF, Options

FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}

_OF_SHORT_ROWS = {"Q4_K": "Q5_0", "Q6_K": "Q8_0"}
"""The types that llama.cpp takes for rows that 256 doesn't divide; others become F16."""


def type_of(type: str, in_features: int) -> str:
    """The type of rows of ``in_features`` weights if the user asks for ``type``: that type, or the
    nearest that can hold such rows.

    Raises:
        OptionError: weights aren't packed to a type of this name.
    """
    known = (*packing.QUANTIZE, *FLOATS)
    if type not in known:
        raise OptionError(f"type: expected one of {', '.join(known)}, got {type!r}")
    while in_features % reference.block_of(type)[0]:
        type = _OF_SHORT_ROWS.get(type, "F16")
    return type


def pack_rows(weight: Tensor, type: str) -> Tensor:
    """The rows of ``weight``, fp32 ``[rows, in]``, as bytes: uint8 ``[rows, row bytes]``.

    Raises:
        WeightError: the type can't hold these values.
    """
    if type in FLOATS:
        return weight.to(FLOATS[type]).view(torch.uint8)
    return GGUF(Options.model_validate({"type": type})).pack(weight).tensors["blocks"]


def unpack_rows(rows: Tensor, type: str) -> Tensor:
    """The fp32 weights of rows of bytes."""
    if type in FLOATS:
        return rows.view(FLOATS[type]).to(torch.float32)
    return reference.dequantize(rows, type)
