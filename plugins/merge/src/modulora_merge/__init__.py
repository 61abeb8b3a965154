"""Adapters merged into packed weights. This module is the entry point: metadata only, no torch."""

from __future__ import annotations

from modulora_core.hookspecs import CommandSpec, hookimpl


@hookimpl
def modulora_commands() -> list[CommandSpec]:
    return [
        CommandSpec(
            name="merge-packed",
            summary="Merge an adapter into the packed weights; the size stays.",
            panel="Use",
            location="modulora_merge.cli.merge_packed:command",
            protocol=2,
        ),
        CommandSpec(
            name="finetune-packed",
            summary="Train an adapter and merge it into the packed weights.",
            panel="Train",
            location="modulora_merge.cli.finetune_packed:command",
            protocol=2,
        ),
    ]
