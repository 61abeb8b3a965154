"""NF4 for ModuLoRA. This module is the entry point: metadata only, no torch."""

from __future__ import annotations

from modulora_core.hookspecs import FormatSpec, hookimpl
from modulora_core.spec import Promise, QuantizerSpec

SPEC = QuantizerSpec(
    name="nf4",
    summary="4-bit NormalFloat of QLoRA: block-wise, data-free, bit for bit bitsandbytes' format",
    location="modulora_nf4.quantizer:NF4",
    protocol=2,
    bits=(4,),
    devices=("cpu", "cuda"),
    capturable=True,
    packing_memory=1.2,
    url="https://arxiv.org/abs/2305.14314",
    # the largest error of three seeds of the kit's weights, and 5 %
    promises=(
        Promise(
            options={},
            bits_per_weight=4.5,
            gaussian=0.0972,
            heavy_tailed=0.131,
            outlier_columns=0.179,
            constant=0.0,
        ),
        Promise(
            options={"double_quant": True},
            bits_per_weight=4.13,
            gaussian=0.0972,
            heavy_tailed=0.131,
            outlier_columns=0.179,
            constant=0.0,
        ),
    ),
)

FORMATS = (
    FormatSpec(
        name="bitsandbytes-nf4",
        summary="bitsandbytes' NF4, as transformers saves it with load_in_4bit; only read",
        location="modulora_nf4.formats:BitsAndBytes",
        protocol=2,
        quant_methods=("bitsandbytes",),
        quant_flags=("load_in_4bit", "_load_in_4bit"),
    ),
)


@hookimpl
def modulora_quantizers() -> list[QuantizerSpec]:
    return [SPEC]


@hookimpl
def modulora_formats() -> list[FormatSpec]:
    return list(FORMATS)
