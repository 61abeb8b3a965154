"""Write a finished training: the adapter, its model card, and its log."""

from __future__ import annotations

import math
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from modulora_core.checkpoints.foreign.writers import base_file, file_writer
from modulora_core.checkpoints.outputs import write_file
from modulora_core.checkpoints.packed_checkpoint import PackedCheckpoint
from modulora_core.distributed import is_first, together
from modulora_core.errors import OutputError
from modulora_core.hf.save_adapter import save_adapter
from modulora_core.lora.adapted import adapter_layers
from modulora_core.lora.settings import LoRASettings
from modulora_core.models.folders import RUN_FILE
from modulora_core.training.checked_run import CheckedRun
from modulora_core.training.model_card import model_card
from modulora_core.training.resuming import CHECKPOINTS
from modulora_core.training.run_log import LOG_FILE, HeldOut, RunLog

_ADAPTER = Path(CHECKPOINTS) / "adapter"
"""The adapter while the ``lora_file`` is made of it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Trained:
    """A finished training. Attributes are as in :class:`FinetuneResult`."""

    model: PreTrainedModel
    trainer: Any
    settings: LoRASettings | None
    tokens: int
    seconds: float
    peak_bytes: int
    eval_loss: float | None
    held_out: HeldOut | None

    def logged(self, name: str) -> list[float]:
        return [entry[name] for entry in self.trainer.state.log_history if name in entry]


def write_outputs(
    run: CheckedRun, checkpoint: PackedCheckpoint, trained: Trained
) -> tuple[str, ...]:
    """Write the card, the log and the adapter. All processes call it; the first one writes.

    The adapter comes last: with it, OUT is finished. Until then ``--resume`` writes all again.

    Returns:
        the ``lora_file`` and the files beside it that the first process wrote.
    """
    out = run.out
    files: tuple[str, ...] = ()
    if run.config.lora_file is not None:
        with together():  # a file is made of a saved adapter, and OUT's comes last
            save_adapter(trained.model, out / _ADAPTER, settings=trained.settings)
    with together():
        if is_first():
            write_file(out / "README.md", _card(run, checkpoint, trained))
            write_file(out / LOG_FILE, _log(run, checkpoint, trained).model_dump_json(indent=1))
            files = _write_lora_file(run, checkpoint)
    with together():
        save_adapter(trained.model, out, settings=trained.settings)
        if not (out / RUN_FILE).is_file():
            raise OutputError(
                f"output folder {out}: somebody removed it, or its {RUN_FILE}, while the run "
                "worked; it has the adapter again, and neither options nor earlier checkpoints"
            )
    return files


def _card(run: CheckedRun, checkpoint: PackedCheckpoint, trained: Trained) -> str:
    scaled = any(layer.input_scale for _, layer in adapter_layers(trained.model))
    return model_card(
        run.config, checkpoint, trained.logged("loss"), trained.eval_loss, data=run.data,
        method=run.method.in_words, channel_scales=scaled,
    )  # fmt: skip


def _write_lora_file(run: CheckedRun, checkpoint: PackedCheckpoint) -> tuple[str, ...]:
    lora_file = run.config.lora_file
    if lora_file is None:
        return ()
    adapter, base = run.out / _ADAPTER, base_file(checkpoint, run.config.model)
    written = file_writer(lora_file).write_adapter(str(adapter), lora_file, model=base)
    shutil.rmtree(adapter)
    return (written.out, *written.beside)


def _log(run: CheckedRun, checkpoint: PackedCheckpoint, trained: Trained) -> RunLog:
    record = checkpoint.record
    return RunLog(
        model=run.model,
        source=str(record.source.get("name") or checkpoint.name),
        quantizers=tuple(dict.fromkeys(group["quantizer"] for group in record.quantizers())),
        bits_per_weight=record.bits_per_weight,
        seconds=trained.seconds,
        peak_memory_bytes=trained.peak_bytes,
        held_out=trained.held_out,
        log_history=[  # JSON has neither NaN nor infinity
            {k: v for k, v in entry.items() if not isinstance(v, float) or math.isfinite(v)}
            for entry in trained.trainer.state.log_history
        ],
    )
