"""An outsider's quantizers of a chosen width, as a package: ``heeding`` heeds H and H_O."""

from modulora_core.tests.conftest import installed_quantizers

INIT = """
from modulora_core.hookspecs import hookimpl
from modulora_core.spec import QuantizerSpec

def spec(name, calibration):
    return QuantizerSpec(
        name=name, summary="Rounds to a grid for each row", protocol=2, bits=(1, 2, 4, 8),
        location="modulora_widths.quantizer:" + name.title(), calibration=calibration,
        output_hessian=calibration == "required", in_multiple=8, qualities={"best": {"bits": 4}},
    )

PLAIN, HEEDING = spec("plain", "none"), spec("heeding", "required")

@hookimpl
def modulora_quantizers():
    return [PLAIN, HEEDING]
"""

QUANTIZER = """
from typing import Annotated, Literal
import torch
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field
from modulora_core.spec import PackedWeight, Quantizer
from modulora_widths import HEEDING, PLAIN

class Options(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")
    bits: Annotated[Literal[1, 2, 4, 8], BeforeValidator(int)] = Field(2, description="of a code")

class Plain(Quantizer):
    spec, Options = PLAIN, Options

    def pack(self, weight, calibration=None):
        bits, w = self.options.bits, weight.float()
        scale = self.scale(w, calibration)  # [out, 1]
        codes = self.codes(w, scale)  # [out, in]
        places = torch.arange(8 // bits) * bits
        packed = (codes.view(len(w), -1, 8 // bits) << places).sum(-1).to(torch.uint8)
        tensors = {"codes": packed, "scale": scale.half()}
        return PackedWeight(self.spec.name, 1, tuple(w.shape), tensors, {"bits": bits})

    def codes(self, w, scale):
        most = 2**self.options.bits - 1
        return (w / scale.half().float() + most / 2).round().clamp(0, most).long()

    def scale(self, w, calibration):
        return w.abs().amax(1, keepdim=True).clamp_min(1e-4) * 2 / (2**self.options.bits - 1)

    def dequantize_tile(self, packed, rows, dtype):
        start, stop = rows
        bits = packed.metadata["bits"]
        places = torch.arange(8 // bits) * bits
        codes = packed.tensors["codes"][start:stop, :, None] >> places & 2**bits - 1
        scale = packed.tensors["scale"][start:stop].float()
        return ((codes.flatten(1).float() - (2**bits - 1) / 2) * scale).to(dtype)

class Heeding(Plain):
    spec = HEEDING

    def scale(self, w, calibration):
        # of a few ranges the one with the least error under H
        best, least = None, None
        for share in (0.5, 0.7, 0.85, 1.0):
            if calibration.progress is not None:
                calibration.progress(share)
            scale = share * super().scale(w, None)
            most = 2**self.options.bits - 1
            d = (self.codes(w, scale) - most / 2) * scale - w
            error = ((d @ calibration.hessian) * d).sum(1, keepdim=True)
            if calibration.output_hessian is not None:  # one share for all rows, as they count
                weights = calibration.output_hessian.diagonal()[:, None]
                error = (weights * error).sum().expand_as(error)
            best = scale if best is None else torch.where(error < least, scale, best)
            least = error if least is None else torch.minimum(error, least)
        return best
"""


def installed(root):
    return installed_quantizers(root, "widths", INIT, QUANTIZER)
