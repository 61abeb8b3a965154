"""GGUF's tensor types for ModuLoRA. This module is the entry point: metadata only, no torch."""

from __future__ import annotations

from modulora_core.hookspecs import FormatSpec, hookimpl
from modulora_core.spec import Promise, QuantizerSpec

SPEC = QuantizerSpec(
    name="gguf",
    summary="llama.cpp's tensor types: reads all 24, of 1 to 16 bits; packs seven, of 4 to 8",
    location="modulora_gguf.quantizer:GGUF",
    protocol=2,
    bits=(4, 5, 6, 8),
    devices=("cpu", "cuda"),
    capturable=True,
    calibration="optional",
    in_multiple=32,
    packing_memory=0.5,
    url="https://github.com/ggml-org/llama.cpp",
    # by `modulora conformance gguf --measure`
    promises=(
        Promise(
            options={},
            bits_per_weight=4.5,
            gaussian=0.087,
            heavy_tailed=0.14,
            outlier_columns=0.16,
            constant=0.00022,
        ),
        Promise(
            options={"type": "Q4_K"},
            bits_per_weight=4.5,
            gaussian=0.072,
            heavy_tailed=0.093,
            outlier_columns=0.11,
            constant=0.0012,
        ),
    ),
)

FORMATS = (
    FormatSpec(
        name="gguf",
        summary="a model in a GGUF file, as llama.cpp has it; `merge` writes one",
        location="modulora_gguf.formats:GGUFModel",
        protocol=2,
        file_suffix=".gguf",
        file_magic="GGUF",
        writer="modulora_gguf.file.merging:LlamaCppWriter",
    ),
)


@hookimpl
def modulora_quantizers() -> list[QuantizerSpec]:
    return [SPEC]


@hookimpl
def modulora_formats() -> list[FormatSpec]:
    return list(FORMATS)
