"""Half-quadratic quantization for ModuLoRA: the entry point, metadata only, no torch."""

from __future__ import annotations

from modulora_core.hookspecs import FormatSpec, hookimpl
from modulora_core.spec import Promise, QuantizerSpec


def _promise(bits: int, gaussian: float, heavy_tailed: float, outlier_columns: float) -> Promise:
    """Scale and offset take half a bit, the unit a ten-thousandth; fp16 rounds a constant."""
    return Promise(
        options={"bits": bits},
        bits_per_weight=bits + 0.5001,
        gaussian=gaussian,
        heavy_tailed=heavy_tailed,
        outlier_columns=outlier_columns,
        constant=2**-11,
    )


SPEC = QuantizerSpec(
    name="half-quadratic",
    summary="1 to 8 bits with a scale and an offset for each group, optimized without data (HQQ)",
    location="modulora_half_quadratic.quantizer:HalfQuadratic",
    protocol=2,
    bits=(1, 2, 3, 4, 5, 6, 7, 8),
    devices=("cpu",),
    url="https://mobiusml.github.io/hqq_blog/",
    # 1.05 times the largest errors of `python benchmarks/error.py --seeds 20`
    promises=(
        _promise(1, gaussian=0.618, heavy_tailed=0.695, outlier_columns=0.365),
        _promise(2, gaussian=0.341, heavy_tailed=0.447, outlier_columns=0.333),
        _promise(3, gaussian=0.178, heavy_tailed=0.252, outlier_columns=0.261),
        _promise(4, gaussian=0.0879, heavy_tailed=0.128, outlier_columns=0.151),
        _promise(8, gaussian=0.00527, heavy_tailed=0.00789, outlier_columns=0.00916),
    ),
)

FORMATS = (
    FormatSpec(
        name="hqq",
        summary="HQQ with groups along rows (axis 1), as transformers saved it; only read",
        location="modulora_half_quadratic.formats:HQQ",
        protocol=2,
        quant_methods=("hqq",),
    ),
)


@hookimpl
def modulora_quantizers() -> list[QuantizerSpec]:
    return [SPEC]


@hookimpl
def modulora_formats() -> list[FormatSpec]:
    return list(FORMATS)
