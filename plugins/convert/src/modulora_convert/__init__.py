"""Rewrites packed checkpoints in other formats. Nothing heavy is imported here."""

from __future__ import annotations

from modulora_core.hookspecs import CommandSpec, hookimpl


@hookimpl
def modulora_commands() -> list[CommandSpec]:
    return [
        CommandSpec(
            name="convert", summary="Rewrite a packed checkpoint in another format.",
            panel="Quantize", location="modulora_convert.command:command", protocol=2,
        )
    ]  # fmt: skip
