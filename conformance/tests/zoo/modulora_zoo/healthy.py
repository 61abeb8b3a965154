"""The healthy one: 4-bit round-to-nearest between the ends of each group, and the seams at which the others break it."""

from __future__ import annotations

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from modulora_core.errors import WeightError
from modulora_core.spec import (
    Calibration,
    PackedLayout,
    PackedWeight,
    Quantizer,
    TensorLayout,
    check_rows,
)
from modulora_zoo import SPECS

LEVELS = 15


class Options(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    group_size: int = Field(32, ge=2, description="weights of a row that share a scale and a zero")


class Healthy(Quantizer):
    """Codes: two in a byte, ``[out, in / 2]``; scales fp16 and zeros (codes of the value 0, fp16) ``[out, groups]``."""

    spec = SPECS["Healthy"]
    Options = Options

    def __init_subclass__(cls, **options: object) -> None:
        super().__init_subclass__(**options)
        cls.spec = SPECS.get(cls.__name__, cls.spec)

    def pack(self, weight: Tensor, calibration: Calibration | None = None) -> PackedWeight:
        self.check_shape((weight.shape[0], weight.shape[1]))
        W = self.prepared(weight)
        if not bool(W.isfinite().all()):
            raise WeightError(
                f"{self.spec.name}: expected a finite weight, got NaN or Inf in one of shape {list(weight.shape)}"
            )
        groups = self.grouped(W)  # [out, groups, G]
        low, high = (
            groups.amin(dim=2).clamp(max=0),
            groups.amax(dim=2).clamp(min=0),
        )  # [out, groups]
        scale = self.scale((high - low) / LEVELS)
        zero = -low / scale.float().clamp(min=1e-8)
        codes = (
            (groups / scale.float().clamp(min=1e-8)[..., None] + zero.half().float()[..., None])
            .add(self.rounding(groups))
            .floor()
        )
        codes = codes.clamp(0, LEVELS).to(torch.uint8).flatten(1)[:, : W.shape[1]]
        return self.packed(codes, scale, zero.half(), weight)

    def prepared(self, weight: Tensor) -> Tensor:
        return weight.detach().to(torch.float32).contiguous()

    def grouped(self, W: Tensor) -> Tensor:
        G = self.options.group_size
        n = -(-W.shape[1] // G)
        padded = torch.cat([W, W[:, -1:].expand(-1, n * G - W.shape[1])], dim=1)
        return padded.reshape(W.shape[0], n, G)

    def scale(self, scale: Tensor) -> Tensor:
        return scale.half()

    def rounding(self, groups: Tensor) -> Tensor | float:
        return 0.5

    def packed(self, codes: Tensor, scale: Tensor, zero: Tensor, weight: Tensor) -> PackedWeight:
        nibbles = codes[:, ::2] | codes[:, 1::2] << 4
        tensors = {"codes": nibbles, "scale": scale, "zero": zero}
        return PackedWeight(
            self.spec.name,
            1,
            (weight.shape[0], weight.shape[1]),
            tensors,
            {"group_size": self.options.group_size},
        )

    def layout(self, shape: tuple[int, int]) -> PackedLayout:
        n = -(-shape[1] // self.options.group_size)
        tensors = {"codes": TensorLayout("uint8", (shape[0], shape[1] // 2)), "scale": TensorLayout("float16", (shape[0], n)),
                   "zero": TensorLayout("float16", (shape[0], n))}  # fmt: skip
        return PackedLayout(
            self.spec.name, 1, shape, tensors, {"group_size": self.options.group_size}
        )

    def dequantize_tile(
        self, packed: PackedWeight, rows: tuple[int, int], dtype: torch.dtype
    ) -> Tensor:
        check_rows(packed, rows)
        return self.decode(packed, rows).to(dtype)

    def codes(self, packed: PackedWeight, rows: tuple[int, int]) -> Tensor:
        """uint8 ``[rows, in]``."""
        nibbles = packed.tensors["codes"][slice(*rows)]
        return torch.stack([nibbles & 15, nibbles >> 4], dim=-1).flatten(1)

    def decode(self, packed: PackedWeight, rows: tuple[int, int]) -> Tensor:
        """fp32 ``[rows, in]``."""
        columns = packed.shape[1]
        scale, zero = (
            self.spread(packed, "scale", rows, columns),
            self.spread(packed, "zero", rows, columns),
        )
        return (self.codes(packed, rows).float() - zero) * scale

    def spread(
        self, packed: PackedWeight, name: str, rows: tuple[int, int], columns: int
    ) -> Tensor:
        """A value of each group at each of its weights, fp32 ``[rows, in]``."""
        values = packed.tensors[name][slice(*rows)].float()
        return values.repeat_interleave(packed.metadata["group_size"], dim=1)[:, :columns]
