"""GGUF files as models: the core finds the tensors, and this module reads and writes their rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from modulora_core.errors import OptionError
from modulora_core.models.file_formats import FileFormat
from modulora_core.models.formats import ForeignWeight, read_finite
from modulora_core.spec import PackedWeight, TensorLayout
from modulora_gguf import packing, reference
from modulora_gguf.quantizer import GGUF, Options

Read = Callable[[str], Tensor]

FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}

_OF_SHORT_ROWS = {"Q4_K": "Q5_0", "Q6_K": "Q8_0"}
"""The types that llama.cpp takes for rows that 256 doesn't divide; others become F16."""


class File(FileFormat):
    """A whole model in a GGUF file."""

    def weights(
        self,
        config: Mapping[str, Any],
        tensors: Mapping[str, TensorLayout],
        read: Read,  # noqa: ARG002 - headers say all
    ) -> Mapping[str, ForeignWeight]:
        """The weights of known types; ``config["types"]`` has the type of each.

        The factor of a weight ``NAME`` is a tensor ``NAME.scale``, fp32 ``[1]``.
        """
        quantizers = {
            kind: GGUF(Options.model_validate({"type": kind})) for kind in reference.DEQUANTIZE
        }
        return {
            name: _weight(name, quantizers[kind], tensors)
            for name, kind in config["types"].items()
            if kind in quantizers and (kind == reference.SCALED or f"{name}.scale" not in tensors)
        }

    def type_of(self, kind: str, in_features: int) -> str:
        known = (*packing.QUANTIZE, *FLOATS)
        if kind not in known:
            raise OptionError(f"type: expected one of {', '.join(known)}, got {kind!r}")
        while in_features % reference.block_of(kind)[0]:
            kind = _OF_SHORT_ROWS.get(kind, "F16")
        return kind

    def pack(self, weight: Tensor, kind: str) -> Tensor:
        if kind in FLOATS:
            return weight.to(FLOATS[kind]).view(torch.uint8)
        return GGUF(Options.model_validate({"type": kind})).pack(weight).tensors["blocks"]

    def unpack(self, rows: Tensor, kind: str) -> Tensor:
        if kind in FLOATS:
            return rows.view(FLOATS[kind]).to(torch.float32)
        return reference.dequantize(rows, kind)


def _weight(name: str, quantizer: GGUF, tensors: Mapping[str, TensorLayout]) -> ForeignWeight:
    weights, nbytes = reference.block_of(quantizer.options.type)
    rows, row_bytes = tensors[name].shape
    scale = f"{name}.scale" if f"{name}.scale" in tensors else None
    layout = quantizer.layout((rows, row_bytes // nbytes * weights))

    def unpack(read: Read) -> PackedWeight:
        found = {"blocks": read(name).contiguous()}
        if "scale" in layout.tensors:
            found["scale"] = (
                torch.ones(1, dtype=torch.float32) if scale is None else read_finite(read, scale)
            )
        return layout.fill(found)

    return ForeignWeight((name,) if scale is None else (name, scale), quantizer, layout, unpack)
