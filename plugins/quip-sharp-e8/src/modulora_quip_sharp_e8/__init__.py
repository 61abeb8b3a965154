"""QuIP# for ModuLoRA. This module is the entry point: metadata only, no torch."""

from __future__ import annotations

from modulora_core.hookspecs import FormatSpec, hookimpl
from modulora_core.spec import Promise, QuantizerSpec

SPEC = QuantizerSpec(
    name="quip-sharp-e8",
    summary="QuIP#: 2, 3 or 4 bits, rotated weights, rounded to points of the E8 lattice",
    location="modulora_quip_sharp_e8.quantizer:QuIPSharpE8",
    protocol=2,
    bits=(2, 3, 4),
    calibration="required",
    output_hessian=True,
    devices=("cpu", "cuda"),
    capturable=True,
    packing_memory=3.5,
    url="https://arxiv.org/abs/2402.04396",
    # the largest of three seeds of the kit's weights, and 5 %:
    # python -m modulora_conformance quip-sharp-e8
    promises=(
        Promise(
            options={"bits": 2},
            bits_per_weight=2.02,
            gaussian=0.318,
            heavy_tailed=0.311,
            outlier_columns=0.16,
            constant=0.497,
        ),
        Promise(
            options={"bits": 3},
            bits_per_weight=3.02,
            gaussian=0.182,
            heavy_tailed=0.177,
            outlier_columns=0.0882,
            constant=0.369,
        ),
        Promise(
            options={"bits": 4},
            bits_per_weight=4.02,
            gaussian=0.104,
            heavy_tailed=0.101,
            outlier_columns=0.056,
            constant=0.329,
        ),
    ),
    rescales=True,
    qualities={"fast": {"sweeps": 0}},
)

FORMATS = (
    FormatSpec(
        name="quip-sharp",
        summary="QuIP#'s published checkpoints, E8P-2Bit and E8PRVQ-3Bit and -4Bit; only read",
        location="modulora_quip_sharp_e8.formats.relaxml:Relaxml",
        protocol=2,
        config_keys=("quip_params",),
    ),
)


@hookimpl
def modulora_quantizers() -> list[QuantizerSpec]:
    return [SPEC]


@hookimpl
def modulora_formats() -> list[FormatSpec]:
    return list(FORMATS)
