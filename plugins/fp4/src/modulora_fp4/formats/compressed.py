"""Read and write NVFP4 and MXFP4 folders of compressed-tensors, as llm-compressor writes them.

Tensors of a linear layer ``M``, whose weight is ``[out, in]``::

    M.weight_packed          uint8 [out, in / 2]         codes, the even element low
    M.weight_scale           float8_e4m3fn [out, in / 16]    uint8 [out, in / 32] (E8M0) in MXFP4
    M.weight_global_scale    fp32 [1]                    NVFP4: scales are divided by it
    M.input_global_scale     fp32 [1]                    may be there, for activations in 4 bits

The bytes are ours. Activations stay as they are: their scales are not read.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from modulora_core.errors import CheckpointError, ModelError
from modulora_core.models.formats import (
    CheckpointFormat,
    ForeignWeight,
    Read,
    StoredWeight,
    check_tensors,
)
from modulora_core.spec import FormatSpec, PackedLayout, PackedWeight, TensorLayout
from modulora_fp4.formats.scales import check_scales, check_type, read_positive
from modulora_fp4.quantizer import FP4, Options
from modulora_fp4.reference import BLOCK

HEAD = "lm_head"
"""transformers' name of a language model's head."""

_STRATEGY = {"mxfp4": "group", "nvfp4": "tensor_group"}
_SCALES = {"mxfp4": "uint8", "nvfp4": "float8_e4m3fn"}


class CompressedTensors(CheckpointFormat):
    """``nvfp4-pack-quantized`` and ``mxfp4-pack-quantized``."""

    def __init__(self, spec: FormatSpec) -> None:
        super().__init__(spec)
        self.kind = spec.name.partition("-")[0]
        self.quantizer = FP4(Options.model_validate({"type": self.kind}))

    def check(self, config: Mapping[str, Any]) -> None:
        sparse = config.get("sparsity_config") or {"format": "dense"}
        form = sparse.get("format") if isinstance(sparse, Mapping) else sparse
        if form != "dense":
            raise ModelError(
                f"compressed-tensors config: expected dense weights, got {form!r:.60}, which is "
                "not implemented; quantize the original model"
            )

    def weights(
        self,
        config: Mapping[str, Any],
        tensors: Mapping[str, TensorLayout],
        read: Read,  # noqa: ARG002 - headers say all
    ) -> dict[str, ForeignWeight]:
        self.check(config)
        found = dict[str, ForeignWeight]()
        for name, stored in tensors.items():
            module, _, part = name.rpartition(".")
            if part != "weight_packed":
                continue
            shape = shape_of(name, stored)
            self.quantizer.check_shape(shape)
            layout = self.quantizer.layout(shape)
            parts = {f"{module}.{part}": t for part, t in self._parts(layout).items()}
            check_tensors(parts, tensors, f"{name} and the format {self.spec.name}")
            more = [f"{module}.input_global_scale"] * (f"{module}.input_global_scale" in tensors)
            unpack = partial(_unpack, module, layout)
            found[module] = ForeignWeight((*parts, *more), self.quantizer, layout, unpack)
        return found

    def _parts(self, layout: PackedLayout) -> dict[str, TensorLayout]:
        ours = layout.tensors
        scales = TensorLayout(_SCALES[self.kind], ours["scales"].shape)
        parts = {"weight_packed": ours["codes"], "weight_scale": scales}
        if "global_scale" in ours:
            parts["weight_global_scale"] = ours["global_scale"]
        return parts

    def plan(self, weight: StoredWeight) -> dict[str, TensorLayout]:
        check_type(weight, self.kind, self.spec.name)
        return self._parts(weight.layout)

    def tensors(self, weight: StoredWeight) -> dict[str, Tensor]:
        packed = weight.packed().tensors
        scales = packed["scales"].view(getattr(torch, _SCALES[self.kind]))
        made = {"weight_packed": packed["codes"], "weight_scale": scales}
        if "global_scale" in packed:
            made["weight_global_scale"] = packed["global_scale"]
        return made

    def config(self, weights: list[StoredWeight], kept: list[str]) -> dict[str, Any]:
        # a tied head is not stored, and so not kept
        ignored = sorted({*kept, HEAD} - {weight.module for weight in weights})
        facts = {
            "num_bits": 4, "type": "float", "strategy": _STRATEGY[self.kind],
            "group_size": BLOCK[self.kind], "symmetric": True, "dynamic": False,
        }  # fmt: skip
        group = {"targets": ["Linear"], "weights": facts, "input_activations": None,
                 "output_activations": None, "format": self.spec.name}  # fmt: skip
        return {
            "quant_method": "compressed-tensors", "format": self.spec.name,
            "quantization_status": "compressed", "config_groups": {"group_0": group},
            "ignore": ignored,
        }  # fmt: skip


def shape_of(name: str, codes: TensorLayout) -> tuple[int, int]:
    if codes.dtype != "uint8" or len(codes.shape) != 2:
        raise CheckpointError(
            f"{name}: expected uint8 [out, in / 2], got {codes.dtype} {list(codes.shape)}"
        )
    return codes.shape[0], 2 * codes.shape[1]


def _unpack(module: str, layout: PackedLayout, read: Read) -> PackedWeight:
    name = f"{module}.weight_scale"
    scales = check_scales(name, layout.metadata["type"], read(name).view(torch.uint8))
    tensors = {"codes": read(f"{module}.weight_packed"), "scales": scales}
    if "global_scale" in layout.tensors:
        tensors["global_scale"] = read_positive(read, f"{module}.weight_global_scale")
    return layout.fill(tensors)
