"""Measures models on data. This module is the entry point: metadata only, no torch.

metrics.py      the names of the metrics
evaluate.py     perplexity and accuracy, and `evaluate`, which chooses the metric
answers.py      ROUGE and exact match of generated answers
divergence.py   two models on the same text
passes.py       prompts with answers, and batches
command.py      ``modulora evaluate``
"""

from __future__ import annotations

from modulora_core.hookspecs import CommandSpec, hookimpl


@hookimpl
def modulora_commands() -> list[CommandSpec]:
    return [
        CommandSpec(
            name="evaluate",
            summary="Measure perplexity, accuracy, ROUGE or exact match.",
            panel="Use",
            location="modulora_evaluate.command:command",
            protocol=2,
        )
    ]
