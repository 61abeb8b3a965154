"""Read bitsandbytes' LLM.int8 folders, as transformers saves them with ``load_in_8bit``.

Tensors of a linear layer ``M``, whose weight is ``[out, in]``::

    M.weight           int8 [out, in]       CB
    M.SCB              fp32 [out]           c
    M.weight_format    uint8 []             0: CB in rows; older GPU layouts are refused

The codes and constants are ours, and Ŵ = CB · SCB / 127 is bitsandbytes' to the last bit. Its
products also round activations to 8 bits, except outliers (``llm_int8_threshold``). We multiply
activations as they are, so that nothing depends on a threshold.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from modulora_core.errors import CheckpointError, ModelError
from modulora_core.models.formats import (
    ForeignWeight,
    FormatReader,
    Read,
    check_tensors,
    read_finite,
)
from modulora_core.spec import PackedLayout, PackedWeight, TensorLayout
from modulora_int8.quantizer import INT8


class BitsAndBytes(FormatReader):
    """bitsandbytes' 8-bit weights."""

    def weights(
        self,
        config: Mapping[str, Any],  # noqa: ARG002 - it has nothing about weights
        tensors: Mapping[str, TensorLayout],
        read: Read,
    ) -> dict[str, ForeignWeight]:
        quantizer, found = INT8(), dict[str, ForeignWeight]()
        for name in tensors:
            module, mark, rest = name.rpartition(".SCB")
            if not mark or rest:
                continue
            weight, order = f"{module}.weight", f"{module}.weight_format"
            shape = _shape(weight, tensors)
            layout = quantizer.layout(shape)
            check_tensors({name: TensorLayout("float32", shape[:1])}, tensors, weight)
            names = (weight, name, *([order] if order in tensors else []))
            if order in tensors and int(read(order).sum()):
                raise ModelError(
                    f"{order}: expected 0, codes in rows, got {int(read(order).sum())}, a layout "
                    "of older GPUs; save the folder again with bitsandbytes 0.45 or later"
                )
            unpack = partial(_unpack, weight, name, layout)
            found[module] = ForeignWeight(names, quantizer, layout, unpack)
        return found


def _shape(weight: str, tensors: Mapping[str, TensorLayout]) -> tuple[int, int]:
    layout = tensors.get(weight)
    if layout is None or layout.dtype != "int8" or len(layout.shape) != 2:
        got = "nothing" if layout is None else f"{layout.dtype} {list(layout.shape)}"
        raise CheckpointError(f"{weight}: expected int8 [out, in] beside its SCB, got {got}")
    return layout.shape[0], layout.shape[1]


def _unpack(weight: str, scales: str, layout: PackedLayout, read: Read) -> PackedWeight:
    """The packed weight. Raises CheckpointError for NaN or Inf in the scales."""
    scale = read_finite(read, scales).reshape(-1, 1)
    return layout.fill({"codes": read(weight), "scales": scale})
