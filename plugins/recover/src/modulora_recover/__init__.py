"""Starts of adapters for ModuLoRA. This module is the entry point: metadata only, no torch."""

from __future__ import annotations

from modulora_core.hookspecs import CommandSpec, hookimpl


@hookimpl
def modulora_commands() -> list[CommandSpec]:
    return [
        CommandSpec(
            name="init-adapter",
            summary="Make an adapter that corrects a quantizer's errors.",
            panel="Train",
            location="modulora_recover.cli.init_adapter:command",
            protocol=2,
        ),
        CommandSpec(
            name="recover",
            summary="Train an adapter on the dense model's predictions.",
            panel="Train",
            location="modulora_recover.cli.recover:command",
            protocol=2,
        ),
    ]
