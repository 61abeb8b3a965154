"""INT8 for ModuLoRA. This module is the entry point: metadata only, no torch."""

from __future__ import annotations

from modulora_core.hookspecs import hookimpl
from modulora_core.spec import QuantizerSpec

SPEC = QuantizerSpec(
    name="int8",
    summary="8-bit integers with a scale for each row (LLM.int8's format) or group, data-free",
    location="modulora_int8.quantizer:INT8",
    protocol=1,
    bits=(8,),
    devices=("cpu",),
    url="https://arxiv.org/abs/2208.07339",
)


@hookimpl
def modulora_quantizers() -> list[QuantizerSpec]:
    return [SPEC]
