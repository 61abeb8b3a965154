"""Two quantizers in plain torch."""

import torch
from pydantic import BaseModel, ConfigDict, Field

from modulora_core.spec import PackedWeight, Quantizer, check_rows
from modulora_toy import TOY, VERBATIM


class ToyOptions(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")
    levels: int = Field(127, ge=1, le=127, description="largest code")


class Toy(Quantizer):
    spec = TOY
    Options = ToyOptions

    def pack(self, weight, calibration=None):
        levels = self.options.levels
        scale = weight.float().abs().amax(dim=1, keepdim=True) / levels  # [out, 1]
        codes = (weight.float() / torch.where(scale == 0, 1, scale)).round().to(torch.int8)
        return PackedWeight(
            "toy", 1, tuple(weight.shape), {"codes": codes, "scale": scale}, {"levels": levels}
        )

    def dequantize_tile(self, packed, rows, dtype):
        check_rows(packed, rows)
        start, stop = rows
        return (
            packed.tensors["codes"][start:stop].float() * packed.tensors["scale"][start:stop]
        ).to(dtype)


class Verbatim(Quantizer):
    spec = VERBATIM

    def pack(self, weight, calibration=None):
        return PackedWeight(
            "verbatim", 1, tuple(weight.shape), {"values": weight.float().contiguous().clone()}
        )

    def dequantize_tile(self, packed, rows, dtype):
        check_rows(packed, rows)
        return packed.tensors["values"][rows[0] : rows[1]].to(dtype, copy=True)
