"""Write the page at the end of a training, by any of transformers' and TRL's trainers."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerState, TrainingArguments

from modulora_compare.report.page import REPORT_FILE, Run, page
from modulora_core.checkpoints.outputs import write_file

_PLACES = ("output_dir", "logging_dir", "run_name")
"""Arguments that say nothing about the training."""


class ReportCallback(TrainerCallback):
    """Write ``report.html`` into the Trainer's ``output_dir``: curves, losses and settings.

    ``Trainer(model, args, callbacks=[ReportCallback()])``. With ``include_num_input_tokens_seen``
    the page has the number of tokens too. After :func:`modulora_core.finetune`,
    ``modulora report ADAPTER`` shows more.
    """

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, *_: Any, **given: Any
    ) -> None:
        if not state.is_world_process_zero:
            return
        model = given.get("model")
        name = getattr(getattr(model, "config", None), "name_or_path", "") or "a model"
        seconds = [e["train_runtime"] for e in state.log_history if "train_runtime" in e]
        out = Path(args.output_dir)
        out.mkdir(parents=True, exist_ok=True)
        run = Run(
            title=f"Training of {name}",
            subtitle=f"{type(model).__name__}, with these settings beside transformers' defaults.",
            history=state.log_history,
            settings=_settings(args),
            seconds=seconds[-1] if seconds else None,
        )
        write_file(out / REPORT_FILE, page(run))


def _settings(args: TrainingArguments) -> dict[str, Any]:
    """The arguments that differ from their defaults."""
    values = args.to_dict()
    defaults = {field.name: field.default for field in dataclasses.fields(args)}
    return {
        name: value
        for name, value in values.items()
        if name in defaults and name not in _PLACES and value != defaults[name]
    }
