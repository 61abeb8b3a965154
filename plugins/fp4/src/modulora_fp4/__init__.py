"""MXFP4 and NVFP4 for ModuLoRA. This module is the entry point: metadata only, no torch."""

from __future__ import annotations

from modulora_core.hookspecs import FormatSpec, hookimpl
from modulora_core.spec import Promise, QuantizerSpec

SPEC = QuantizerSpec(
    name="fp4",
    summary="4-bit floats in small blocks: MXFP4, as gpt-oss has it, and NVFP4",
    location="modulora_fp4.quantizer:FP4",
    protocol=2,
    bits=(4,),
    calibration="optional",
    devices=("cpu", "cuda"),
    capturable=True,
    in_multiple=16,
    packing_memory=0.5,
    url="https://www.opencompute.org/documents/ocp-microscaling-formats-mx-v1-0-spec-final-pdf",
    # the largest error of three seeds of the kit's weights, and 5 %
    promises=(
        Promise(
            options={},
            bits_per_weight=4.25,
            gaussian=0.117,
            heavy_tailed=0.145,
            outlier_columns=0.176,
            constant=0.18,
        ),
        Promise(
            options={"type": "nvfp4"},
            bits_per_weight=4.501,
            gaussian=0.0856,
            heavy_tailed=0.0888,
            outlier_columns=0.0929,
            constant=1e-06,
        ),
    ),
)

FORMATS = (
    FormatSpec(
        name="mxfp4",
        summary="gpt-oss's layout: stacks of experts in MXFP4, other layers dense",
        location="modulora_fp4.formats.gpt_oss:GptOss",
        protocol=2,
        quant_methods=("mxfp4",),
    ),
    FormatSpec(
        name="nvfp4-pack-quantized",
        summary="compressed-tensors' NVFP4, which llm-compressor and vLLM use",
        location="modulora_fp4.formats.compressed:CompressedTensors",
        protocol=2,
        quant_methods=("compressed-tensors",),
        quant_formats=("nvfp4-pack-quantized",),
    ),
    FormatSpec(
        name="modelopt",
        summary="NVFP4 of NVIDIA's ModelOpt; only read",
        location="modulora_fp4.formats.modelopt:ModelOpt",
        protocol=2,
        quant_methods=("modelopt",),
        config_files=("hf_quant_config.json",),
    ),
    FormatSpec(
        name="mxfp4-pack-quantized",
        summary="compressed-tensors' MXFP4 of linear layers",
        location="modulora_fp4.formats.compressed:CompressedTensors",
        protocol=2,
        quant_methods=("compressed-tensors",),
        quant_formats=("mxfp4-pack-quantized",),
    ),
)


@hookimpl
def modulora_quantizers() -> list[QuantizerSpec]:
    return [SPEC]


@hookimpl
def modulora_formats() -> list[FormatSpec]:
    return list(FORMATS)
