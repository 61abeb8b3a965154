"""INT8 for ModuLoRA. This module is the entry point: metadata only, no torch."""

from __future__ import annotations

from modulora_core.hookspecs import FormatSpec, hookimpl
from modulora_core.spec import Promise, QuantizerSpec

SPEC = QuantizerSpec(
    name="int8",
    summary="8-bit integers with a scale for each row (LLM.int8's format) or group, data-free",
    location="modulora_int8.quantizer:INT8",
    protocol=2,
    bits=(8,),
    devices=("cpu", "cuda"),
    capturable=True,
    packing_memory=1.3,
    url="https://arxiv.org/abs/2208.07339",
    # the largest error of three seeds of the kit's weights, and 5 %
    promises=(
        Promise(
            options={},
            bits_per_weight=8.02,
            gaussian=0.00785,
            heavy_tailed=0.0249,
            outlier_columns=0.0334,
            constant=0.0005,
        ),
        Promise(
            options={"group_size": 64},
            bits_per_weight=8.5,
            gaussian=0.00625,
            heavy_tailed=0.0117,
            outlier_columns=0.0177,
            constant=0.0005,
        ),
    ),
)

FORMATS = (
    FormatSpec(
        name="bitsandbytes-int8",
        summary="LLM.int8, as transformers saves it with load_in_8bit; only read",
        location="modulora_int8.formats:BitsAndBytes",
        protocol=2,
        quant_methods=("bitsandbytes",),
        quant_flags=("load_in_8bit", "_load_in_8bit"),
    ),
)


@hookimpl
def modulora_quantizers() -> list[QuantizerSpec]:
    return [SPEC]


@hookimpl
def modulora_formats() -> list[FormatSpec]:
    return list(FORMATS)
