"""``modulora weigh`` for ModuLoRA: the entry point, metadata only, no torch."""

from __future__ import annotations

from modulora_core.hookspecs import CommandSpec, hookimpl


@hookimpl
def modulora_commands() -> list[CommandSpec]:
    return [
        CommandSpec(
            name="weigh",
            summary="Show which layers of a model take its bytes.",
            panel="Use",
            location="modulora_weigh.command:command",
            protocol=2,
        )
    ]
