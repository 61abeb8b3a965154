"""Finetune an adapter on a packed model: from a config to an adapter folder.

OUT/finetune.yaml                 the config, written before training; resume compares with it
OUT/checkpoints/checkpoint-N/     during training; each is an adapter folder too
OUT/README.md                     a model card
OUT/log.json                      the losses of all steps, for a report
OUT/modulora.json                 the base of the adapter
OUT/adapter_model.safetensors
OUT/modulora_scales.safetensors   with channel scales only
OUT/adapter_config.json           written last: with it, OUT is a finished adapter
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, TrainerCallback

from modulora_core.arguments import checked
from modulora_core.checkpoints.outputs import check_disk_space, only_writer, write_file
from modulora_core.checkpoints.packed_checkpoint import PackedCheckpoint
from modulora_core.checkpoints.peak_memory import PeakMemory
from modulora_core.data.sources import Source
from modulora_core.dense_products import matmul_precision
from modulora_core.distributed import is_first, together
from modulora_core.hf.load_adapter import load_adapter
from modulora_core.hf.load_model import load_model, resolved_dtype
from modulora_core.lora.adapted import adapter_layers
from modulora_core.lora.adapting import add_lora
from modulora_core.lora.settings import LoRASettings
from modulora_core.models.config import vocabulary_of
from modulora_core.models.folders import RUN_FILE
from modulora_core.progress import Display, quiet, shown
from modulora_core.quantization.cache import CachedModel
from modulora_core.training.batches import check_joined
from modulora_core.training.checked_run import CheckedRun, checked_run
from modulora_core.training.checkpoints import remove_half_written, trainer_state
from modulora_core.training.config import FinetuneConfig
from modulora_core.training.gradient_checkpointing import checkpoint_activations
from modulora_core.training.held_out import held_out
from modulora_core.training.interruption import Interruption
from modulora_core.training.loss_trend import eval_loss_before, worsening
from modulora_core.training.methods import Method, trainer_refused
from modulora_core.training.outputs import Trained, write_outputs
from modulora_core.training.resuming import CHECKPOINTS, record_examples
from modulora_core.training.run_log import HeldOut
from modulora_core.training.sharding import is_sharded
from modulora_core.training.trainer import (
    AdapterTrainer,
    OnEval,
    OnStep,
    TrainerParts,
    Watcher,
    last_eval_loss,
)

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class FinetuneResult:
    """The result of a run. A run that was finished before has no steps.

    Attributes:
        losses: the loss of each optimizer step, over the trained tokens of its batch.
        eval_loss: the loss after the last step; None without evaluation data.
        eval_loss_before: the loss before the first step; None without evaluation data, or if the
            run began without ``baseline``.
        seconds: duration of training and evaluations in this call.
        tokens_per_second: trained tokens, without padding, divided by ``seconds``.
        model: the packed model: the config's, or its folder in the cache.
        files: the ``lora_file`` and the files beside it that the first process wrote.
        padding: share of padding in the training batches of this call; None if the method
            counts none.
        held_out: the loss on examples that the run did not reach, with ``baseline`` and without
            evaluation data; None after a whole epoch.
    """

    out: str
    steps: int = 0
    losses: list[float] = field(default_factory=list)
    eval_loss: float | None = None
    seconds: float = 0.0
    tokens_per_second: float = 0.0
    peak_memory_bytes: int = 0
    eval_loss_before: float | None = None
    model: str
    files: tuple[str, ...] = ()
    padding: float | None = None
    held_out: HeldOut | None = None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@checked
def finetune(
    config: FinetuneConfig,
    *,
    data: Source | None = None,
    eval_data: Source | None = None,
    resume: bool = False,
    on_step: OnStep | None = None,
    on_eval: OnEval | None = None,
    callbacks: Sequence[TrainerCallback] = (),
    method: Method | None = None,
    progress: Display = True,
) -> FinetuneResult:
    """Train an adapter and write it to ``config.out``, in PEFT's format.

    In a distributed run all processes call it, and the first one writes. Ctrl-C and SIGTERM end the
    run at its next decoder block, or in several processes after the forward and backward pass. Its
    last whole step becomes a checkpoint to resume from. A second signal ends the run at once.

    Args:
        config: the run. :meth:`FinetuneConfig.build` makes it from options and a file.
        data, eval_data: records as dicts or a ``datasets.Dataset``, instead of the config's.
        resume: continue an interrupted run of the same config from its last whole checkpoint, with
            the losses of an uninterrupted run. Without a whole checkpoint, start again. A finished
            run is left as it is: the result has no steps.
        on_step: called after each optimizer step.
        on_eval: called after each evaluation.
        callbacks: callbacks of transformers' Trainer.
        method: a plugin's own method, instead of supervised finetuning.
        progress: called with a title, the steps done and their number; by default a bar on a
            terminal, and False shows none. :class:`~modulora_core.progress.Bars` draws its own.

    Raises:
        OutputError: ``out`` holds a finished adapter, other files, or, without ``resume``, an
            unfinished run with a whole checkpoint.
        OptionError: an option does not fit the model, the device, or the run to resume.
        ModelError: the model is not packed.
        RequestError: the data, the adapter to continue, or the model cannot be used.
        WorkError: the loss became NaN, infinite, or that of a guess. Every other error comes before
            work starts.
        Interrupted: a KeyboardInterrupt, after a signal.
    """
    out = Path(config.out)
    with together():
        run = checked_run(config, data, eval_data, out, resume, method)
    if run.begun.finished:
        return FinetuneResult(out=config.out, model=run.model)
    config = run.config
    checkpoint = _packed(run.base, progress)
    trained = _train(run, checkpoint, progress, on_step, on_eval, callbacks)
    losses, eval_loss = trained.logged("loss"), trained.eval_loss
    files = write_outputs(run, checkpoint, trained)
    worse = worsening(losses, eval_loss, vocabulary_of(trained.model.config))
    if worse:
        advice = f"the adapter makes the model worse; lower the learning rate (lr {config.lr:g})"
        logger.warning("%s: %s: %s", out, worse, advice)
    return FinetuneResult(
        out=config.out,
        steps=len(losses),
        losses=losses,
        eval_loss=eval_loss,
        seconds=trained.seconds,
        tokens_per_second=trained.tokens / trained.seconds,
        peak_memory_bytes=trained.peak_bytes,
        eval_loss_before=eval_loss_before(trained.trainer.state.log_history),
        model=run.model,
        files=files,
        padding=trained.trainer.padding(),
        held_out=trained.held_out,
    )


def _train(
    run: CheckedRun,
    checkpoint: PackedCheckpoint,
    progress: Display,
    on_step: OnStep | None,
    on_eval: OnEval | None,
    callbacks: Sequence[TrainerCallback],
) -> Trained:
    """Load the model, put the adapter on, and train it."""
    config, out, device, examples = run.config, run.out, run.device, run.examples
    method, interruption = run.method, Interruption()
    watcher = Watcher(on_step, on_eval, interruption)
    with (
        PeakMemory(device) as peak,
        quiet(),
        only_writer(out) if is_first() else nullcontext(),
        matmul_precision(config.matmul_precision),
    ):
        with together(), shown(progress, "loading the model", "layers"):
            with trainer_refused(config.trainer, out / CHECKPOINTS):
                arguments = method.arguments(config, out / CHECKPOINTS, run.steps, device)
            arguments.eval_on_start = "eval" in examples and _is_due(config, run.begun.checkpoint)
            model = _loaded(checkpoint, config, device)
            settings = _put_adapter(model, config)
            method.check_model(model, checkpoint.name)
            if config.packing:
                check_joined(model, config.batch_size)
            check_disk_space(out, _nbytes(model) + method.nbytes)
            with trainer_refused(config.trainer, out / CHECKPOINTS):
                of_run = {"settings": settings, "memory": peak, "callbacks": [watcher, *callbacks]}
                trainer = method.trainer(
                    TrainerParts(model, config, arguments, examples, run.tokenizer, of_run)
                )
                if config.gradient_checkpointing:
                    checkpoint_activations(model, keep_products=config.keep_products)
                trainer.get_train_dataloader()
        if is_first():
            write_file(out / RUN_FILE, config.to_yaml())
            record_examples(out, examples)
            remove_half_written(out / CHECKPOINTS)
        with together():
            if is_first():
                method.prepare(device, progress)
        watcher.vocabulary = vocabulary_of(model.config)
        with shown(progress, "training", "steps") as watcher.show:
            started = time.perf_counter()
            with interruption.watched(model):
                tokens = trainer.run(run.begun.checkpoint)
                interruption.check()
                seconds = time.perf_counter() - started
                eval_loss = trainer.final_eval_loss() if "eval" in examples else None
                asked = config.baseline and "eval" not in examples
                plain = trainer if isinstance(trainer, AdapterTrainer) else None
                unread = held_out(plain) if asked and plain else None
    return Trained(
        model=model, trainer=trainer, settings=settings, tokens=tokens, seconds=seconds,
        peak_bytes=peak.nbytes, eval_loss=eval_loss, held_out=unread,
    )  # fmt: skip


def _is_due(config: FinetuneConfig, checkpoint: Path | None) -> bool:
    """Whether an evaluation comes first: before any training, or again after an interruption."""
    if checkpoint is None:
        return config.baseline
    state, every = trainer_state(checkpoint), config.eval_every
    return every is not None and state.global_step % every == 0 and last_eval_loss(state) is None


def _packed(base: PackedCheckpoint | CachedModel, progress: Display) -> PackedCheckpoint:
    """The packed model; a dense one is quantized now."""
    if isinstance(base, PackedCheckpoint):
        return base
    with shown(progress, "reading", "bytes") as show:
        return base.packed(show)


def _loaded(
    checkpoint: PackedCheckpoint, config: FinetuneConfig, device: torch.device
) -> PreTrainedModel:
    """The model, on the CPU if FSDP2 will split it: as a whole it may not fit on a GPU."""
    dtype = str(resolved_dtype(config.dtype, device.type)).removeprefix("torch.")
    place = "cpu" if is_sharded(config) else str(device)
    return load_model(
        checkpoint, dtype=dtype, device=place, mapped=config.mapped,
        parity_check=config.parity_check,
    )  # fmt: skip


def _put_adapter(model: PreTrainedModel, config: FinetuneConfig) -> LoRASettings | None:
    """Put on a new adapter, and return its settings; or load the adapter to continue."""
    if config.adapter is not None:
        load_adapter(model, config.adapter, trainable=True)
        for _, layer in adapter_layers(model):
            layer.dropout["default"].p = config.dropout
        return None
    settings = LoRASettings(
        config.rank, config.alpha, config.dropout, config.targets, config.seed, config.train_scales
    )
    add_lora(model, settings)
    return settings


def _nbytes(model: nn.Module) -> int:
    """Bytes that a run writes: the adapter, three checkpoints with two moments, small files."""
    adapter = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    return adapter * (1 + 3 * 3) + 2**20
