"""Commands of ModuLoRA that show results: ``compare``, ``demo``, ``report`` and ``tasks``.

:class:`~modulora_compare.report.callback.ReportCallback` writes the page of any Trainer. This
module is the entry point: metadata only, no torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from modulora_core.hookspecs import CommandSpec, hookimpl

if TYPE_CHECKING:
    from modulora_compare.report.callback import ReportCallback as ReportCallback

__all__ = ["ReportCallback", "modulora_commands"]


def _command(name: str, panel: str, summary: str) -> CommandSpec:
    location = f"modulora_compare.cli.{name}:command"
    return CommandSpec(name=name, summary=summary, panel=panel, location=location, protocol=2)


@hookimpl
def modulora_commands() -> list[CommandSpec]:
    return [
        _command("demo", "Start", "Quantize, finetune, evaluate and question a small model."),
        _command("compare", "Quantize", "Compare quantizers on a model."),
        _command("report", "Train", "Write a page about a finished finetuning run."),
        _command("tasks", "Use", "Measure a model on tasks of lm-evaluation-harness."),
    ]


def __getattr__(name: str) -> Any:
    if name != "ReportCallback":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from modulora_compare.report.callback import ReportCallback

    return ReportCallback
