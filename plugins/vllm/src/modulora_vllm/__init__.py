"""Adapters for vLLM. This module is the entry point: metadata only, no torch."""

from __future__ import annotations

from modulora_core.hookspecs import FormatSpec, hookimpl


@hookimpl
def modulora_formats() -> list[FormatSpec]:
    return [
        FormatSpec(
            name="vllm",
            summary="an adapter as vLLM's LoRA loader takes it",
            location="modulora_vllm.export:VLLMAdapter",
            protocol=2,
            adapters=True,
        )
    ]
