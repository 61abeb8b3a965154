"""Read folders of optimum-quanto, as ``QuantizedModelForCausalLM.save_pretrained`` writes them.

quanto_qmap.json names the quantized layers: ``{"model.layers.0.mlp.up_proj": {"weights": "qint8",
"activations": "none"}, ...}``. Tensors of such a layer ``M``, whose weight is ``[out, in]``::

    M.weight._data                     int8 [out, in]      codes
    M.weight._scale                    float [out, 1]      s
    M.input_scale, M.output_scale      float []            of quantized activations

Ŵ = code · s. The quantizer ``int8`` has Ŵ = code · c / 127, so c = 127 s, in fp32. Ŵ differs from
quanto's by rounding only, at most 2⁻²² of its magnitude. We multiply activations as they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from modulora_core import registry
from modulora_core.errors import CheckpointError, ModelError
from modulora_core.models.formats import (
    ForeignWeight,
    FormatReader,
    Read,
    check_tensors,
    read_finite,
)
from modulora_core.spec import PackedLayout, PackedWeight, TensorLayout


class Quanto(FormatReader):
    """Weights of 8-bit integers with a scale for each row, which the quantizer int8 holds."""

    def check(self, config: Mapping[str, Any]) -> None:
        for module, kinds in config.items():
            found = kinds.get("weights") if isinstance(kinds, Mapping) else kinds
            if found != "qint8":
                raise ModelError(
                    f"quanto_qmap.json: {module}: expected weights of qint8, got {found!r}; "
                    "quantize the original model"
                )

    def weights(
        self,
        config: Mapping[str, Any],
        tensors: Mapping[str, TensorLayout],
        read: Read,  # noqa: ARG002 - no layout needs a value
    ) -> dict[str, ForeignWeight]:
        quantizer, found = registry.create("int8"), dict[str, ForeignWeight]()
        for module in config:
            data, scale = f"{module}.weight._data", f"{module}.weight._scale"
            codes = tensors.get(data)
            if codes is None or codes.dtype != "int8" or len(codes.shape) != 2:
                raise CheckpointError(f"{data}: expected int8 [out, in], got {codes or 'nothing'}")
            rows, columns = codes.shape
            dtype = tensors[scale].dtype if scale in tensors else "float32"
            check_tensors({scale: TensorLayout(dtype, (rows, 1))}, tensors, data)
            others = (f"{module}.input_scale", f"{module}.output_scale")
            layout = quantizer.layout((rows, columns))
            found[module] = ForeignWeight(
                (data, scale, *(name for name in others if name in tensors)),
                quantizer, layout, partial(_unpack, data, scale, layout),
            )  # fmt: skip
        return found


def _unpack(data: str, scale: str, layout: PackedLayout, read: Read) -> PackedWeight:
    """The packed weight. Raises CheckpointError for NaN or Inf in the scales."""
    return layout.fill({"codes": read(data), "scales": 127 * read_finite(read, scale).float()})
