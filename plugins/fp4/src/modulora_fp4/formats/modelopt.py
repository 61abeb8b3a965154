"""Read NVFP4 folders of NVIDIA's ModelOpt.

Tensors of a linear layer ``M``, whose weight is ``[out, in]``::

    M.weight            uint8 [out, in / 2]             codes, the even element low
    M.weight_scale      float8_e4m3fn [out, in / 16]
    M.weight_scale_2    fp32 []                         scales are multiplied by it
    M.input_scale       fp32 []                         for activations in 4 bits: not read

We divide scales by its reciprocal, as compressed-tensors' converter and vLLM do. So a value may
differ from ModelOpt's in the last bit of fp32.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch

from modulora_core.errors import ModelError
from modulora_core.models.formats import ForeignWeight, FormatReader, Read, check_tensors
from modulora_core.spec import PackedLayout, PackedWeight, TensorLayout
from modulora_fp4.formats.compressed import shape_of
from modulora_fp4.formats.scales import check_scales, read_positive
from modulora_fp4.quantizer import FP4, Options


class ModelOpt(FormatReader):
    """ModelOpt's NVFP4 weights."""

    def check(self, config: Mapping[str, Any]) -> None:
        inner = config.get("quantization")  # in a file of its own the facts are one level deeper
        facts = inner if isinstance(inner, Mapping) else config
        if facts.get("quant_algo") != "NVFP4":
            raise ModelError(
                f"ModelOpt config: expected quant_algo NVFP4, got {facts.get('quant_algo')!r}, "
                "which is not implemented; give the original model"
            )

    def weights(
        self,
        config: Mapping[str, Any],
        tensors: Mapping[str, TensorLayout],
        read: Read,  # noqa: ARG002 - headers say all
    ) -> dict[str, ForeignWeight]:
        self.check(config)
        quantizer, found = FP4(Options(type="nvfp4")), dict[str, ForeignWeight]()
        for name in tensors:
            module, _, part = name.rpartition(".")
            if part != "weight_scale_2":
                continue
            weight = f"{module}.weight"
            shape = shape_of(weight, tensors.get(weight, TensorLayout("uint8", ())))
            quantizer.check_shape(shape)
            layout = quantizer.layout(shape)
            scales = TensorLayout("float8_e4m3fn", layout.tensors["scales"].shape)
            parts = {
                weight: layout.tensors["codes"],
                f"{module}.weight_scale": scales,
                name: TensorLayout("float32", ()),
            }
            check_tensors(parts, tensors, f"{weight} and NVFP4")
            more = [f"{module}.input_scale"] * (f"{module}.input_scale" in tensors)
            unpack = partial(_unpack, module, layout)
            found[module] = ForeignWeight((*parts, *more), quantizer, layout, unpack)
        return found


def _unpack(module: str, layout: PackedLayout, read: Read) -> PackedWeight:
    name = f"{module}.weight_scale"
    scales = check_scales(name, "nvfp4", read(name).view(torch.uint8))
    tensors = {
        "codes": read(f"{module}.weight"),
        "scales": scales,
        "global_scale": 1 / read_positive(read, f"{module}.weight_scale_2"),
    }
    return layout.fill(tensors)
