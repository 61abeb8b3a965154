"""A planner for ModuLoRA: the memory of a job, and which quantizer for which layer in a budget.

This module is the entry point: metadata only, no torch. ``plan``, ``assign`` and ``Budget`` are
imported on first use.

    request.py, model.py          the question, and its model from the config alone
    byte_counts.py, rehearsal.py  a step on fake tensors, counted by item
    memory.py, processes.py       the items of training, decoding and quantizing
    fitting.py, remedies.py       plans, what a budget allows, and settings that save memory
    picture.py                    the bars
    budget/                       the search for bits under a budget, which writes an assignment
    commands/                     ``modulora plan``, ``modulora assign``
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from modulora_core.hookspecs import CommandSpec, hookimpl

if TYPE_CHECKING:
    from modulora_planner.budget.assign import assign as assign
    from modulora_planner.budget.search import Budget as Budget
    from modulora_planner.fitting import plan as plan

_PUBLIC = {"Budget": "budget.search", "assign": "budget.assign", "plan": "fitting"}

__all__ = ["Budget", "assign", "plan"]

COMMANDS = [
    CommandSpec(
        name="plan",
        summary="Plan the memory of a model before it is downloaded.",
        panel="Start",
        location="modulora_planner.commands.plan:command",
        protocol=2,
    ),
    CommandSpec(
        name="assign",
        summary="Choose a quantizer for each layer, within a budget of bytes.",
        panel="Quantize",
        location="modulora_planner.commands.assign:command",
        protocol=2,
    ),
]


@hookimpl
def modulora_commands() -> list[CommandSpec]:
    return COMMANDS


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_PUBLIC[name]}"), name)
