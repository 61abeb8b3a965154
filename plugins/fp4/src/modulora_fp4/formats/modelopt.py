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
from typing import Any

from torch import Tensor

from modulora_core.errors import ModelError
from modulora_core.models.formats import ForeignWeight, FormatReader, Read
from modulora_core.spec import PackedLayout, TensorLayout
from modulora_fp4.formats.compressed import read_layer
from modulora_fp4.formats.scales import read_positive
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
        quantizer = FP4(Options(type="nvfp4"))
        return {
            module: read_layer(quantizer, module, "weight", _parts, tensors, _global_scale)
            for module, _, part in (name.rpartition(".") for name in tensors)
            if part == "weight_scale_2"
        }


def _parts(layout: PackedLayout) -> dict[str, TensorLayout]:
    return {
        "weight": layout.tensors["codes"],
        "weight_scale": TensorLayout("float8_e4m3fn", layout.tensors["scales"].shape),
        "weight_scale_2": TensorLayout("float32", ()),
    }


def _global_scale(module: str, read: Read) -> Tensor:
    return 1 / read_positive(read, f"{module}.weight_scale_2")
