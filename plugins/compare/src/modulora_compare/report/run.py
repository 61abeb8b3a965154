"""Read the facts of a finished run from the folder of its adapter."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from modulora_compare.report.page import Run, Sample
from modulora_core.models.folders import RUN_FILE
from modulora_core.training.config import FinetuneConfig, read_options
from modulora_core.training.run_log import RunLog


def read_run(folder: Path) -> tuple[FinetuneConfig, RunLog]:
    """The config of the run that wrote an adapter, and its log.

    Raises:
        AdapterError: the folder has no log of a finished run.
        OptionError: its config can't be read.
    """
    log = RunLog.read(folder)
    values = read_options(folder / RUN_FILE)
    # a run of a plugin's command has options of its own
    known = {name: value for name, value in values.items() if name in FinetuneConfig.model_fields}
    return FinetuneConfig.build(known), log


def adapter_run(
    folder: Path, config: FinetuneConfig, log: RunLog, samples: Sequence[Sample] = ()
) -> Run:
    """The facts for the page of an adapter."""
    base, adapter = shlex.quote(log.model), shlex.quote(str(folder))
    return Run(
        title=f"Finetuning of {log.source}",
        subtitle="A LoRA adapter, trained on weights quantized with "
        f"{', '.join(log.quantizers)} ({log.bits_per_weight:.2f} bits per weight).",
        history=log.log_history,
        settings=read_options(folder / RUN_FILE),
        seconds=log.seconds,
        peak_memory_bytes=log.peak_memory_bytes,
        held_out=log.held_out,
        samples=samples,
        sampled="training" if config.eval_data is None else "evaluation",
        commands=[
            f"modulora chat {base} --adapter {adapter}",
            f"modulora evaluate {base} --adapter {adapter}",
            f"modulora merge {base} MERGED --adapter {adapter}",
        ],
    )
