"""QTIP for ModuLoRA. This module is the entry point: metadata only, no torch."""

from __future__ import annotations

from modulora_core.hookspecs import FormatSpec, hookimpl
from modulora_core.spec import Promise, QuantizerSpec

SPEC = QuantizerSpec(
    name="qtip",
    summary="QTIP: 1 to 8 bits and halves, rotated weights, 256 at a time as a walk on a trellis",
    location="modulora_qtip.quantizer:QTIP",
    protocol=2,
    bits=(1, 1.5, 2, 2.5, 3, 3.5, 4, 4.5, 5, 5.5, 6, 6.5, 7, 7.5, 8),
    calibration="required",
    output_hessian=True,
    devices=("cpu", "cuda"),
    capturable=True,
    packing_memory=3.5,
    url="https://arxiv.org/abs/2406.11235",
    # the largest of three seeds of the kit's weights, and 5 %:
    # python -m modulora_conformance qtip
    promises=(
        Promise(
            options={"bits": 2},
            bits_per_weight=2.02,
            gaussian=0.283,
            heavy_tailed=0.278,
            outlier_columns=0.133,
            constant=0.371,
        ),
        Promise(
            options={"bits": 3},
            bits_per_weight=3.02,
            gaussian=0.145,
            heavy_tailed=0.142,
            outlier_columns=0.0669,
            constant=0.251,
        ),
        Promise(
            options={"bits": 4},
            bits_per_weight=4.02,
            gaussian=0.0756,
            heavy_tailed=0.0741,
            outlier_columns=0.0346,
            constant=0.197,
        ),
    ),
    rescales=True,
    qualities={"fast": {"sweeps": 0}, "best": {"states": 14, "sweeps": 2}},
)

FORMATS = (
    FormatSpec(
        name="exl3",
        summary="EXL3, which ExLlamaV3 and TabbyAPI run; written from the layout exl3",
        location="modulora_qtip.formats.exl3:EXL3",
        protocol=2,
        quant_methods=("exl3",),
        config_files=("quantization_config.json",),
    ),
)


@hookimpl
def modulora_quantizers() -> list[QuantizerSpec]:
    return [SPEC]


@hookimpl
def modulora_formats() -> list[FormatSpec]:
    return list(FORMATS)
