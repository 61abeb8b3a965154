"""The commands of the kit, for ``modulora``. Nothing heavy is imported here."""

from __future__ import annotations

from modulora_core.hookspecs import CommandSpec, hookimpl


def _command(name: str, summary: str, panel: str = "Plugins") -> CommandSpec:
    location = f"modulora_conformance.commands.{name.replace('-', '_')}:command"
    return CommandSpec(name=name, summary=summary, panel=panel, location=location, protocol=2)


@hookimpl
def modulora_commands() -> list[CommandSpec]:
    return [
        _command("doctor", "Check this machine and each installed quantizer.", "Start"),
        _command("conformance", "Check that a quantizer keeps its promises."),
        _command("bench", "Measure a quantizer's speed beside a dense layer."),
        _command("check-gpu", "Compare kernels with plain torch, and measure a GPU."),
        _command("new-plugin", "Write a plugin package with a working quantizer."),
    ]
