"""OPTQ for ModuLoRA. This module is the entry point: metadata only, no torch."""

from __future__ import annotations

from modulora_core.hookspecs import FormatSpec, hookimpl
from modulora_core.spec import Promise, QuantizerSpec

SPEC = QuantizerSpec(
    name="optq",
    summary="OPTQ (GPTQ): 2, 3, 4 or 8 bits, each column's error compensated by the ones after it",
    location="modulora_optq.quantizer:OPTQ",
    protocol=2,
    bits=(2, 3, 4, 8),
    calibration="required",
    output_hessian=True,
    devices=("cpu", "cuda"),
    capturable=True,
    packing_memory=4.5,
    qualities={"fast": {"sweeps": 0}, "best": {"sweeps": 4}},
    url="https://arxiv.org/abs/2210.17323",
    # errors: the largest of three seeds of the kit's weights, and 5 %; measure them again by
    # `python -m modulora_conformance optq`
    promises=(
        Promise(
            options={"bits": 2},
            bits_per_weight=2.29,
            gaussian=0.37,
            heavy_tailed=0.456,
            outlier_columns=0.33,
            constant=0.0005,
        ),
        Promise(
            options={"bits": 3},
            bits_per_weight=3.3,
            gaussian=0.186,
            heavy_tailed=0.262,
            outlier_columns=0.258,
            constant=0.0005,
        ),
        Promise(
            options={"bits": 4},
            bits_per_weight=4.32,
            gaussian=0.0921,
            heavy_tailed=0.135,
            outlier_columns=0.157,
            constant=0.0005,
        ),
        Promise(
            options={"bits": 8},
            bits_per_weight=8.38,
            gaussian=0.00565,
            heavy_tailed=0.0083,
            outlier_columns=0.00975,
            constant=0.0005,
        ),
    ),
)

FORMATS = (
    FormatSpec(
        name="gptq",
        summary="GPTQ v1; v2 is read by this name too",
        location="modulora_optq.formats.gptq:GPTQ",
        protocol=2,
        quant_methods=("gptq",),
        config_files=("quantize_config.json",),
    ),
    FormatSpec(
        name="gptq_v2",
        summary="GPTQ v2, which holds every zero point",
        location="modulora_optq.formats.gptq:GPTQ",
        protocol=2,
        config_files=("quantize_config.json",),
    ),
    FormatSpec(
        name="awq",
        summary="AWQ, 4 bits in the layout gemm; only read",
        location="modulora_optq.formats.awq:AWQ",
        protocol=2,
        quant_methods=("awq",),
        config_files=("quant_config.json",),
    ),
    FormatSpec(
        name="pack-quantized",
        summary="compressed-tensors' integers in words, which llm-compressor and vLLM use",
        location="modulora_optq.formats.compressed:PackQuantized",
        protocol=2,
        quant_methods=("compressed-tensors",),
        quant_formats=("pack-quantized",),
    ),
)


@hookimpl
def modulora_quantizers() -> list[QuantizerSpec]:
    return [SPEC]


@hookimpl
def modulora_formats() -> list[FormatSpec]:
    return list(FORMATS)
