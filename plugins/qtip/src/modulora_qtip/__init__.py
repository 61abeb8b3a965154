"""QTIP for ModuLoRA. This module is the entry point: metadata only, no torch."""

from __future__ import annotations

from modulora_core.hookspecs import hookimpl
from modulora_core.spec import QuantizerSpec

SPEC = QuantizerSpec(
    name="qtip",
    summary="QTIP: 1 to 8 bits, rotated weights, 256 at a time as a walk on a trellis",
    location="modulora_qtip.quantizer:QTIP",
    protocol=1,
    bits=(1, 2, 3, 4, 5, 6, 7, 8),
    calibration="required",
    devices=("cpu", "cuda"),
    packing_memory=3.5,
    url="https://arxiv.org/abs/2406.11235",
    rescales=True,
)


@hookimpl
def modulora_quantizers() -> list[QuantizerSpec]:
    return [SPEC]
