"""Read and write NVFP4 and MXFP4 folders of compressed-tensors, as llm-compressor writes them.

Tensors of a linear layer ``M``, whose weight is ``[out, in]``::

    M.weight_packed          uint8 [out, in / 2]         codes, the even element low
    M.weight_scale           float8_e4m3fn [out, in / 16]    uint8 [out, in / 32] (E8M0) in MXFP4
    M.weight_global_scale    fp32 [1]                    NVFP4: scales are divided by it
    M.input_global_scale     fp32 [1]                    may be there, for activations in 4 bits

The bytes are ours. Activations stay as they are: their scales are not read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from modulora_kernels.grouped_format import ALL_LINEAR, GroupedFormat
from torch import Tensor

from modulora_core.errors import CheckpointError
from modulora_core.hookspecs import FormatSpec
from modulora_core.models.formats import (
    ForeignWeight,
    Read,
    StoredWeight,
    check_tensors,
)
from modulora_core.spec import PackedLayout, PackedWeight, TensorLayout
from modulora_fp4.formats.scales import check_scales, check_type, read_positive
from modulora_fp4.quantizer import FP4, Options
from modulora_fp4.reference import BLOCK

_STRATEGY = {"mxfp4": "group", "nvfp4": "tensor_group"}
_OF_ACTIVATIONS = ("input_global_scale", "input_scale")
_SCALES = {"mxfp4": "uint8", "nvfp4": "float8_e4m3fn"}


class CompressedTensors(GroupedFormat):
    """``nvfp4-pack-quantized`` and ``mxfp4-pack-quantized``.

    compressed-tensors dequantizes both to bfloat16.
    """

    dtype = "bfloat16"

    def __init__(self, spec: FormatSpec) -> None:
        super().__init__(spec)
        self.kind = spec.name.partition("-")[0]
        self.quantizer = FP4(Options.model_validate({"type": self.kind}))

    def weights(
        self,
        config: Mapping[str, Any],
        tensors: Mapping[str, TensorLayout],
        read: Read,  # noqa: ARG002 - headers say all
    ) -> dict[str, ForeignWeight]:
        self.check(config)
        return {
            module: read_layer(self.quantizer, module, part, self._parts, tensors, self._global)
            for module, _, part in (name.rpartition(".") for name in tensors)
            if part == "weight_packed"
        }

    def _global(self, module: str, read: Read) -> Tensor:
        return read_positive(read, f"{module}.weight_global_scale")

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

    def groups(
        self,
        weights: list[StoredWeight],  # noqa: ARG002 - all weights have one type
    ) -> list[tuple[Sequence[str], dict[str, Any]]]:
        facts = {
            "num_bits": 4, "type": "float", "strategy": _STRATEGY[self.kind],
            "group_size": BLOCK[self.kind], "symmetric": True, "dynamic": False,
        }  # fmt: skip
        return [(ALL_LINEAR, facts)]


def read_layer(
    quantizer: FP4,
    module: str,
    codes: str,
    parts: Callable[[PackedLayout], Mapping[str, TensorLayout]],
    tensors: Mapping[str, TensorLayout],
    global_scale: Callable[[str, Read], Tensor],
) -> ForeignWeight:
    """A linear layer with scales in ``weight_scale``.

    Args:
        codes: the name of its codes; ``parts`` gives all its tensors' layouts by name.
        tensors: of all files; scales of activations are taken and not read.
        global_scale: reads the number that NVFP4's scales are divided by.

    Raises:
        CheckpointError: tensors that are missing, or of other dtypes or shapes.
        ShapeError: blocks don't divide the rows.
    """
    shape = _shape_of(f"{module}.{codes}", tensors.get(f"{module}.{codes}"))
    quantizer.check_shape(shape)
    layout = quantizer.layout(shape)
    stored = {f"{module}.{part}": tensor for part, tensor in parts(layout).items()}
    check_tensors(stored, tensors, f"{module}.{codes} and {layout.metadata['type']}")
    scale = f"{module}.weight_scale"

    def unpack(read: Read) -> PackedWeight:
        bits = read(scale).view(torch.uint8)
        made = {
            "codes": read(f"{module}.{codes}"),
            "scales": check_scales(scale, layout.metadata["type"], bits),
        }
        if "global_scale" in layout.tensors:
            made["global_scale"] = global_scale(module, read)
        return layout.fill(made)

    more = [f"{module}.{name}" for name in _OF_ACTIVATIONS if f"{module}.{name}" in tensors]
    return ForeignWeight((*stored, *more), quantizer, layout, unpack)


def _shape_of(name: str, codes: TensorLayout | None) -> tuple[int, int]:
    if codes is None or codes.dtype != "uint8" or len(codes.shape) != 2:
        got = "nothing" if codes is None else f"{codes.dtype} {list(codes.shape)}"
        raise CheckpointError(f"{name}: expected uint8 [out, in / 2], got {got}")
    return codes.shape[0], 2 * codes.shape[1]
