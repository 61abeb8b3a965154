"""Read and write folders in gpt-oss's layout: fused experts in MXFP4, other layers dense.

A stack of experts ``P``, such as ``model.layers.0.mlp.experts.gate_up_proj``, whose matrices are
``[out, in]``, is two tensors::

    P_blocks    uint8 [experts, out, in / 32, 16]    codes, two a byte, the even element low
    P_scales    uint8 [experts, out, in / 32]        E8M0

The codes and scales are ours, byte for byte. The model's code sees each matrix as ``[in, out]``.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, ClassVar

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
from modulora_core.spec import PackedLayout, PackedWeight, TensorLayout
from modulora_fp4.formats.scales import check_scales, check_type
from modulora_fp4.quantizer import FP4, Options
from modulora_fp4.reference import BLOCK

_SIZE = BLOCK["mxfp4"]
_BYTES = _SIZE // 2


class GptOss(CheckpointFormat):
    """gpt-oss's experts in MXFP4."""

    stacks: ClassVar[bool] = True

    def weights(
        self,
        config: Mapping[str, Any],  # noqa: ARG002 - it names the dense layers only
        tensors: Mapping[str, TensorLayout],
        read: Read,  # noqa: ARG002 - headers say all
    ) -> dict[str, ForeignWeight]:
        quantizer, found = FP4(Options(type="mxfp4")), dict[str, ForeignWeight]()
        for name, stored in tensors.items():
            parameter = name.removesuffix("_blocks")
            if parameter == name:
                continue
            experts, shape = _shape(name, stored)
            scales = f"{parameter}_scales"
            expected = TensorLayout("uint8", (experts, shape[0], shape[1] // _SIZE))
            check_tensors({scales: expected}, tensors, name)
            layout = quantizer.layout(shape)
            unpack = partial(_unpack, name, scales, layout)
            found[parameter] = ForeignWeight((name, scales), quantizer, layout, unpack, experts)
        return found

    def plan(self, weight: StoredWeight) -> dict[str, TensorLayout]:
        if weight.experts is None or not weight.transposed:
            raise ModelError(
                f"packed; {self.spec.name} holds gpt-oss's experts only, and its other layers are "
                "dense. Quantize the original model with --include '*experts*'"
            )
        check_type(weight, "mxfp4", self.spec.name)
        rows, columns = weight.layout.shape
        groups = (weight.experts, rows, columns // _SIZE)
        return {
            "blocks": TensorLayout("uint8", (*groups, _BYTES)),
            "scales": TensorLayout("uint8", groups),
        }

    def tensors(self, weight: StoredWeight) -> dict[str, Tensor]:
        layouts = self.plan(weight)
        made = {name: torch.empty(t.shape, dtype=torch.uint8) for name, t in layouts.items()}
        for index in range(len(made["scales"])):
            packed = weight.packed(index).tensors
            made["blocks"][index] = packed["codes"].view(made["blocks"].shape[1:])
            made["scales"][index] = packed["scales"]
        return made

    def config(self, weights: list[StoredWeight], kept: list[str]) -> dict[str, Any]:
        del weights
        return {"quant_method": "mxfp4", "modules_to_not_convert": kept}


def _shape(name: str, blocks: TensorLayout) -> tuple[int, tuple[int, int]]:
    """The number of experts, and ``(out, in)`` of each."""
    if blocks.dtype != "uint8" or len(blocks.shape) != 4 or blocks.shape[3] != _BYTES:
        raise CheckpointError(
            f"{name}: expected uint8 [experts, out, in / {_SIZE}, {_BYTES}], got {blocks.dtype} "
            f"{list(blocks.shape)}"
        )
    experts, rows, groups, _ = blocks.shape
    return experts, (rows, groups * _SIZE)


def _unpack(blocks: str, scales: str, layout: PackedLayout, read: Read) -> PackedWeight:
    codes = read(blocks).flatten(1)
    return layout.fill({"codes": codes, "scales": check_scales(scales, "mxfp4", read(scales))})
