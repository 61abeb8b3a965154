"""Write a finished training: the adapter, its model card, and its report."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel

from modulora_core.adapters.adapted import adapter_layers
from modulora_core.adapters.files import base_file, file_writer
from modulora_core.adapters.save import save_adapter
from modulora_core.adapters.settings import LoRASettings
from modulora_core.checkpoints.packed_checkpoint import PackedCheckpoint
from modulora_core.checkpoints.written.outputs import write_file
from modulora_core.distributed import barrier, is_first
from modulora_core.errors import OutputError
from modulora_core.models.folders import RUN_FILE
from modulora_core.progress import Display, shown
from modulora_core.training.checked_run import CheckedRun
from modulora_core.training.held_out import HeldOut
from modulora_core.training.model_card import model_card
from modulora_core.training.report import REPORT_FILE, report
from modulora_core.training.samples import LEAST, answers


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
    run: CheckedRun, checkpoint: PackedCheckpoint, trained: Trained, progress: Display
) -> tuple[str, ...]:
    """Write the adapter, its card and its report. All processes call it; the first one writes.

    Returns:
        the ``lora_file`` and the files beside it that the first process wrote.

    Raises:
        OutputError: somebody removed the folder, or the run's config in it.
    """
    out = run.out
    _write_card(run, checkpoint, trained)
    save_adapter(trained.model, out, settings=trained.settings)
    files = _write_lora_file(run, checkpoint)
    if run.config.report:
        _write_report(run, checkpoint, trained, progress)
    if run.predictions is not None and is_first():
        run.predictions.file.unlink()
    barrier()  # OUT is whole
    if not (out / RUN_FILE).is_file():
        raise OutputError(
            f"output folder {out}: somebody removed it, or its {RUN_FILE}, while the run worked; "
            "it has the adapter again, and neither options nor earlier checkpoints"
        )
    return files


def _write_card(run: CheckedRun, checkpoint: PackedCheckpoint, trained: Trained) -> None:
    scaled = any(layer.input_scale for _, layer in adapter_layers(trained.model))
    card = model_card(
        run.config, checkpoint, trained.logged("loss"), trained.eval_loss, data=run.data,
        channel_scales=scaled,
    )  # fmt: skip
    if is_first():
        write_file(run.out / "README.md", card)


def _write_lora_file(run: CheckedRun, checkpoint: PackedCheckpoint) -> tuple[str, ...]:
    lora_file = run.config.lora_file
    if lora_file is None or not is_first():
        return ()
    base = base_file(checkpoint, run.config.model)
    written = file_writer(lora_file).write_adapter(str(run.out), lora_file, model=base)
    return (written.out, *written.beside)


def _write_report(
    run: CheckedRun, checkpoint: PackedCheckpoint, trained: Trained, progress: Display
) -> None:
    trainer, seconds = trained.trainer, trained.seconds
    with shown(progress, f"answering prompts for {REPORT_FILE}", "tokens") as show:
        samples = answers(
            trained.model, run.tokenizer, trainer.eval_dataset or trainer.train_dataset,
            seconds=max(LEAST, seconds / 10), tokens_per_second=trained.tokens / seconds,
            show=show,
        )  # fmt: skip
    page = report(
        run.config, checkpoint, trainer.state.log_history, samples, seconds=seconds,
        peak_memory_bytes=trained.peak_bytes,
        sampled="evaluation" if "eval" in run.examples else "training",
        held_out=trained.held_out,
    )  # fmt: skip
    if is_first():
        write_file(run.out / REPORT_FILE, page)
