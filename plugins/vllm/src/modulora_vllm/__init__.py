"""Serving: any quantizer in vLLM, ``serve``, and adapters for vLLM.

This module is an entry point of ``modulora``: metadata only, no torch. vLLM's own entry point is
:func:`modulora_vllm.registration.register`.
"""

from __future__ import annotations

from modulora_core.hookspecs import CommandSpec, FormatSpec, hookimpl


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


@hookimpl
def modulora_commands() -> list[CommandSpec]:
    return [
        CommandSpec(
            name="serve",
            summary="Serve a model and its adapters to OpenAI's clients.",
            panel="Use",
            location="modulora_vllm.cli.serve:command",
            protocol=2,
        )
    ]
