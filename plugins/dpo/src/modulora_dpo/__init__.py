"""Trains adapters on preferences. This module is the entry point: metadata only, no torch.

config.py         the options
preferences.py    a prompt, a chosen and a rejected answer, as rows for TRL
dpo.py            `dpo`: the run, with TRL's DPOTrainer
command.py        ``modulora dpo``
"""

from __future__ import annotations

from modulora_core.hookspecs import CommandSpec, hookimpl


@hookimpl
def modulora_commands() -> list[CommandSpec]:
    return [
        CommandSpec(
            name="dpo",
            summary="Train an adapter on chosen and rejected answers.",
            panel="Train",
            location="modulora_dpo.command:command",
            protocol=2,
        )
    ]
