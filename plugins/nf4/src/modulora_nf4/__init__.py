"""NF4 for ModuLoRA. This module is the entry point: metadata only, no torch."""

from __future__ import annotations

from modulora_core.hookspecs import hookimpl
from modulora_core.spec import QuantizerSpec

SPEC = QuantizerSpec(
    name="nf4",
    summary="4-bit NormalFloat of QLoRA: block-wise, data-free, bit for bit bitsandbytes' format",
    location="modulora_nf4.quantizer:NF4",
    protocol=1,
    bits=(4,),
    devices=("cpu",),
    url="https://arxiv.org/abs/2305.14314",
)


@hookimpl
def modulora_quantizers() -> list[QuantizerSpec]:
    return [SPEC]
