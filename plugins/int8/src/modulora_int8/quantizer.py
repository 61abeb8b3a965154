"""INT8 behind the contract: options, packed tensors, and which code runs where.

Packed tensors::

    codes     int8 [out, in]
    scales    fp32 [out, groups]       the absmax of each; without group_size a row is one group

Metadata: ``group_size``.
"""

from __future__ import annotations

from functools import cache
from typing import Any, ClassVar

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from modulora_core import kernels
from modulora_core.errors import CheckpointError, WeightError
from modulora_core.spec import Calibration, PackedLayout, PackedWeight, Quantizer, TensorLayout, check_rows
from modulora_core.tiles import tile_bytes, tile_ranges
from modulora_int8 import SPEC, reference

FEW_ROWS = 24
"""Up to so many rows of x the fused kernel is faster than a matrix product over decoded tiles (README, Speed)."""

FEW_ROWS_GROUPED = 8
"""The same with group_size: a sum that is scaled every 64 columns costs twice as much."""


class Options(BaseModel):
    """What a user may choose."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    group_size: int | None = Field(
        None,
        ge=2,
        description="how many consecutive weights of a row share a scale; by default the whole row",
    )


class INT8(Quantizer):
    """Absmax quantization to 8 bits (LLM.int8, arXiv 2208.07339); row-wise it is bitsandbytes' format."""

    spec = SPEC
    format = 1
    Options: ClassVar[type[BaseModel]] = Options

    def pack(self, weight: Tensor, calibration: Calibration | None = None) -> PackedWeight:  # noqa: ARG002 - data-free
        """Quantize ``weight``, ``[out, in]``.

        Raises:
            WeightError: it has NaN or Inf, or values that fp32 can't hold.
        """
        weight = weight.detach()
        out_features, in_features = weight.shape
        layout = self.layout((out_features, in_features))
        packed = layout.empty(weight.device)
        codes, scales = packed.tensors["codes"], packed.tensors["scales"]
        # some rows at a time: the reference needs several fp32 copies of what it is given
        for start, stop in tile_ranges(out_features, 4 * in_features, tile_bytes(weight.device)):
            codes[start:stop], scales[start:stop] = reference.quantize(
                weight[start:stop], self.options.group_size
            )
        if not bool(scales.isfinite().all()):
            raise WeightError(
                "int8: expected finite weights that fp32 can hold, got NaN or Inf in a weight of shape "
                f"{list(weight.shape)}"
            )
        return packed

    def layout(self, shape: tuple[int, int]) -> PackedLayout:
        tensors = _tensors(shape, self.options.group_size)
        return PackedLayout(self.spec.name, self.format, shape, tensors, self.options.model_dump())

    def dequantize_tile(self, packed: PackedWeight, rows: tuple[int, int], dtype: torch.dtype) -> Tensor:
        check_rows(packed, rows)
        codes, scales = _checked(packed)
        cpu = _kernels(packed.device)
        if cpu is None:
            part = slice(*rows)
            return reference.dequantize(codes[part], scales[part], packed.metadata["group_size"]).to(dtype)

        def fill(start: int, stop: int, out: Tensor) -> None:
            kernels.launch(cpu.dequantize, codes[start:stop], scales[start:stop], _columns(packed), out)

        return kernels.filled_tile(fill, rows, packed.shape[1], dtype)

    def matmul(self, x: Tensor, packed: PackedWeight, transpose: bool = False) -> Tensor:
        out_features, in_features = packed.shape
        cpu = _kernels(packed.device)
        given, wanted = (out_features, in_features) if transpose else (in_features, out_features)
        most = FEW_ROWS if packed.metadata["group_size"] is None else FEW_ROWS_GROUPED
        few = None if cpu is None else kernels.few_rows(x, given, most)  # [n, given]
        if few is None:
            return super().matmul(x, packed, transpose)
        codes, scales = _checked(packed)
        y = torch.empty(few.shape[0], wanted)
        kernel = cpu.matmul_transposed if transpose else cpu.matmul
        kernels.launch(kernel, codes, scales, _columns(packed), few, y)
        return y.to(x.dtype).view(*x.shape[:-1], wanted)


def _kernels(device: torch.device) -> Any:
    """The compiled kernels; None where they can't run, and then the reference does."""
    return kernels.load("modulora_int8.cpu", device)


def _columns(packed: PackedWeight) -> int:
    """How many columns share a scale."""
    return packed.metadata["group_size"] or max(1, packed.shape[1])


@cache
def _tensors(shape: tuple[int, int], group_size: int | None) -> dict[str, TensorLayout]:
    out_features, in_features = shape
    groups = reference.groups(in_features, group_size)
    return {
        "codes": TensorLayout("int8", (out_features, in_features)),
        "scales": TensorLayout("float32", (out_features, groups)),
    }


def _checked(packed: PackedWeight) -> tuple[Tensor, Tensor]:
    """Codes and scales. Raises CheckpointError when they aren't of the shapes that the kernels would read."""
    expected = _tensors(packed.shape, packed.metadata["group_size"])
    codes, scales = packed.tensors["codes"], packed.tensors["scales"]
    if codes.shape != expected["codes"].shape or scales.shape != expected["scales"].shape:
        raise CheckpointError(
            f"int8 weight of shape {list(packed.shape)}, {dict(packed.metadata)}: expected codes of "
            f"{list(expected['codes'].shape)} and scales of {list(expected['scales'].shape)}, "
            f"got {list(codes.shape)} and {list(scales.shape)}"
        )
    return codes, scales
