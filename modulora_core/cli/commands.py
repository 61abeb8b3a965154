"""The commands of the core, given through the hook by which every plugin gives its own."""

from __future__ import annotations

from modulora_core.hookspecs import CommandSpec, hookimpl


def _command(name: str, panel: str, summary: str) -> CommandSpec:
    location = f"modulora_core.cli.{name.replace('-', '_')}:command"
    return CommandSpec(name=name, summary=summary, panel=panel, location=location, protocol=2)


@hookimpl
def modulora_commands() -> list[CommandSpec]:
    return [
        _command("list-quantizers", "Start", "List the installed quantizers."),
        _command("quantize", "Quantize", "Pack a model's linear layers with a quantizer."),
        _command("info", "Quantize", "Show what a quantized model or an adapter contains."),
        _command("finetune", "Train", "Train a LoRA adapter on a quantized or dense model."),
        _command("generate", "Use", "Answer a prompt, and print tokens as they come."),
        _command("chat", "Use", "Chat with a model."),
        _command("merge", "Use", "Dequantize a packed model and add an adapter to it."),
    ]
