"""OPTQ for ModuLoRA. This module is the entry point: metadata only, no torch."""

from __future__ import annotations

from modulora_core.hookspecs import hookimpl
from modulora_core.spec import FormatSpec, QuantizerSpec

SPEC = QuantizerSpec(
    name="optq",
    summary="OPTQ (GPTQ): 2, 3, 4 or 8 bits, each column's error compensated by the ones after it",
    location="modulora_optq.quantizer:OPTQ",
    protocol=1,
    bits=(2, 3, 4, 8),
    calibration="required",
    devices=("cpu",),
    url="https://arxiv.org/abs/2210.17323",
    formats=(
        FormatSpec(
            name="gptq",
            summary="GPTQ v1; v2 is read by this name too",
            location="modulora_optq.gptq:GPTQ",
            quant_methods=("gptq",),
            config_files=("quantize_config.json",),
        ),
        FormatSpec(
            name="gptq_v2",
            summary="GPTQ v2, which holds every zero point",
            location="modulora_optq.gptq:GPTQ",
            config_files=("quantize_config.json",),
        ),
    ),
)


@hookimpl
def modulora_quantizers() -> list[QuantizerSpec]:
    return [SPEC]
