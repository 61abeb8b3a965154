"""QuIP# for ModuLoRA. This module is the entry point: metadata only, no torch."""

from __future__ import annotations

from modulora_core.hookspecs import hookimpl
from modulora_core.spec import FormatSpec, QuantizerSpec

SPEC = QuantizerSpec(
    name="quip-sharp-e8",
    summary="QuIP#: 2, 3 or 4 bits, rotated until no weight stands out, rounded to points of the E8 lattice",
    location="modulora_quip_sharp_e8.quantizer:QuIPSharpE8",
    protocol=1,
    bits=(2, 3, 4),
    calibration="required",
    devices=("cpu",),
    url="https://arxiv.org/abs/2402.04396",
    rescales=True,
    formats=(
        FormatSpec(
            name="quip-sharp",
            summary="QuIP#'s published checkpoints, E8P-2Bit and E8PRVQ-3Bit and -4Bit; only read",
            location="modulora_quip_sharp_e8.relaxml:Relaxml",
            config_keys=("quip_params",),
        ),
    ),
)


@hookimpl
def modulora_quantizers() -> list[QuantizerSpec]:
    return [SPEC]
