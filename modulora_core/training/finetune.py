"""Finetune an adapter on a packed model: from a config to an adapter folder.

OUT/finetune.yaml                 the config, written before training; resume compares with it
OUT/checkpoints/checkpoint-N/     during training; each is an adapter folder too
OUT/README.md                     a model card
OUT/modulora.json                 the base of the adapter
OUT/adapter_model.safetensors
OUT/modulora_scales.safetensors   with channel scales only
OUT/adapter_config.json           written last: with it, OUT is a finished adapter
OUT/report.html                   curves, settings, answers without and with the adapter
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, TrainerCallback, TrainingArguments

from modulora_core.adapters.lora import LoRASettings, adapter_layers, add_lora
from modulora_core.adapters.peft_format import CONFIG_FILE, read_adapter
from modulora_core.adapters.save_load import load_adapter, save_adapter
from modulora_core.adapters.targets import select_layers
from modulora_core.checkpoints.checkpoint import (
    PackedCheckpoint,
    check_mapped,
    load_dtype,
    load_model,
    open_checkpoint,
)
from modulora_core.checkpoints.outputs import (
    check_disk_space,
    check_output,
    only_writer,
    partial_name,
    write_file,
)
from modulora_core.data import Collator, Examples, load_examples
from modulora_core.data.templates import Template
from modulora_core.devices import pick_device
from modulora_core.devices.dense_products import matmul_precision
from modulora_core.devices.memory import PeakMemory
from modulora_core.devices.processes import barrier, is_first, together, world_size
from modulora_core.errors import OptionError, OutputError
from modulora_core.models.folders import RUN_FILE
from modulora_core.models.quiet import quiet
from modulora_core.training.arguments import (
    check_optimizer,
    total_steps,
    training_arguments,
    warn_of_warmup,
)
from modulora_core.training.checkpoints import (
    latest_checkpoint,
    processes_of,
    remove_half_written,
)
from modulora_core.training.config import FinetuneConfig
from modulora_core.training.gradient_checkpointing import checkpoint_activations
from modulora_core.training.losses import divergence
from modulora_core.training.model_card import model_card
from modulora_core.training.report import REPORT_FILE, report
from modulora_core.training.samples import answers
from modulora_core.training.sharding import check_sharding, is_sharded
from modulora_core.training.trainer import AdapterTrainer, OnEval, OnStep, Watcher
from modulora_core.training.trainer_options import check_reporters, trainer_options

CHECKPOINTS = "checkpoints"

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class FinetuneResult:
    """The result of a run.

    Attributes:
        out: the adapter folder.
        losses: the loss of each optimizer step, over the trained tokens of its batch.
        eval_loss: after the last step; None without evaluation data.
        eval_loss_before: before the first step; None without evaluation data or report.
        seconds: duration of training in this call, without the steps before a resume.
        tokens_per_second: without padding.
        peak_memory_bytes: of loading and training
            (:class:`modulora_core.devices.memory.PeakMemory`).
    """

    out: str
    steps: int
    losses: list[float]
    eval_loss: float | None
    seconds: float
    tokens_per_second: float
    peak_memory_bytes: int
    eval_loss_before: float | None = None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def finetune(
    config: FinetuneConfig,
    *,
    resume: bool = False,
    on_step: OnStep | None = None,
    on_eval: OnEval | None = None,
    callbacks: Sequence[TrainerCallback] = (),
) -> FinetuneResult:
    """Train an adapter and write it to ``config.out``, in PEFT's format.

    In a distributed run all processes call it, and the first one writes.

    Args:
        config: the run. :meth:`FinetuneConfig.build` makes it from options and a file.
        resume: continue an interrupted run of the same config from its last whole checkpoint, with
            the losses of an uninterrupted run. Without a whole checkpoint, start again.
        on_step: called after each optimizer step.
        on_eval: called after each evaluation.
        callbacks: callbacks of transformers' Trainer.

    Raises:
        OutputError: ``out`` holds a finished adapter, other files, or, without ``resume``, an
            unfinished run with a whole checkpoint.
        OptionError: an option does not fit the model, the device, or the run to resume.
        ModelError: the model is not packed.
        RequestError: the data, the adapter to continue, or the model cannot be used.
        WorkError: the loss became NaN or infinite. Every other error comes before work starts.
    """
    out = Path(config.out)
    with together():
        resume_from = _check_out(out, config, resume)
        device = pick_device()
        checkpoint = _checked_model(config, device)
        tokenizer = checkpoint.tokenizer()
        template = Template.of(config.prompt, config.completion)
        data = {
            name: load_examples(
                source, tokenizer, format=config.format, seq_len=config.seq_len, template=template
            )
            for name, source in (("train", config.data), ("eval", config.eval_data))
            if source is not None
        }
        steps = total_steps(config, len(data["train"]), world_size())
        warn_of_warmup(config, steps)
    with (
        PeakMemory(device) as peak,
        quiet(),
        only_writer(out) if is_first() else nullcontext(),
        matmul_precision(config.matmul_precision),
    ):
        with together():
            arguments = training_arguments(config, out / CHECKPOINTS, steps, device)
            arguments.eval_on_start &= resume_from is None
            model = _loaded(checkpoint, config, device)
            settings = _put_adapter(model, config)
            check_disk_space(out, _nbytes(model))
        if is_first():
            write_file(out / RUN_FILE, config.to_yaml())
            remove_half_written(out / CHECKPOINTS)
        started = time.perf_counter()
        trainer = _trainer(
            model, config, arguments, data, tokenizer,
            settings=settings, memory=peak, callbacks=[Watcher(on_step, on_eval), *callbacks],
        )  # fmt: skip
        tokens = trainer.run(resume_from)
        seconds = time.perf_counter() - started
        eval_loss = trainer.final_eval_loss() if "eval" in data else None
    history = trainer.state.log_history
    losses = [entry["loss"] for entry in history if "loss" in entry]
    evaluations = [entry["eval_loss"] for entry in history if "eval_loss" in entry]
    eval_loss_before = evaluations[0] if config.report and evaluations else None
    scaled = any(layer.input_scale for _, layer in adapter_layers(model))
    card = model_card(config, checkpoint, losses, eval_loss, channel_scales=scaled)
    if is_first():
        write_file(out / "README.md", card)
    save_adapter(model, out, settings=settings)
    if config.report:
        samples = answers(model, tokenizer, data.get("eval", data["train"]))
        page = report(
            config, checkpoint, history, samples, seconds=seconds, peak_memory_bytes=peak.nbytes
        )
        if is_first():
            write_file(out / REPORT_FILE, page)
    barrier()  # OUT is whole
    worse = divergence(losses, eval_loss, model.config.get_text_config().vocab_size)
    if worse:
        advice = f"the adapter makes the model worse; lower the learning rate (lr {config.lr:g})"
        logger.warning("%s: %s: %s", out, worse, advice)
    return FinetuneResult(
        config.out, len(losses), losses, eval_loss, seconds, tokens / seconds, peak.nbytes,
        eval_loss_before,
    )  # fmt: skip


def _loaded(
    checkpoint: PackedCheckpoint, config: FinetuneConfig, device: torch.device
) -> PreTrainedModel:
    """The model, on the CPU if FSDP2 will split it: as a whole it may not fit on a GPU."""
    dtype = str(load_dtype(config.dtype, device.type)).removeprefix("torch.")
    place = "cpu" if is_sharded(config) else str(device)
    return load_model(checkpoint, dtype=dtype, device=place, mapped=config.mapped)


def _trainer(
    model: PreTrainedModel,
    config: FinetuneConfig,
    arguments: TrainingArguments,
    data: Mapping[str, Examples],
    tokenizer: Any,
    **common: Any,
) -> AdapterTrainer:
    if config.gradient_checkpointing:
        checkpoint_activations(model, keep_products=config.keep_products)
    # any id will do to pad: attention and labels mask it
    pads = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    return AdapterTrainer(
        model=model,
        args=arguments,
        data_collator=Collator(next(int(pad) for pad in pads if pad is not None)),
        train_dataset=data["train"],
        eval_dataset=data.get("eval"),
        offload_activations=config.offload_activations,
        **common,
    )


def _check_out(out: Path, config: FinetuneConfig, resume: bool) -> Path | None:
    """Check the output folder. Returns the checkpoint to resume from, or None to start."""
    if (out / CONFIG_FILE).is_file():
        advice = (
            f"nothing is left to resume; to continue training, choose another OUT and give "
            f"--adapter {out}"
            if resume
            else "choose another name or remove it"
        )
        raise OutputError(f"output folder {out}: it holds a finished adapter; {advice}")
    if not (out / RUN_FILE).is_file():
        check_output(out)
        return None
    checkpoint = latest_checkpoint(out / CHECKPOINTS)
    if checkpoint is None:  # nothing would be lost, so the run may start again
        if not resume:
            _check_only_begun(out)
        logger.info("%s: starting again; the run in it left no whole checkpoint", out)
        return None
    if not resume:
        raise OutputError(
            f"output folder {out}: it holds an unfinished run; continue it with --resume, or "
            "remove it"
        )
    before = FinetuneConfig.build({}, file=out / RUN_FILE)
    batches = [
        run.batch_size * run.grad_accum * processes
        for run, processes in ((before, processes_of(checkpoint)), (config, world_size()))
    ]
    if batches[0] != batches[1]:
        raise OptionError(
            f"resume of {out}: expected {batches[0]} examples a step (batch_size × grad_accum × "
            f"processes), got {batches[1]}; change grad_accum or the number of processes"
        )
    changed = config.differences(before)
    if changed:
        raise OptionError(
            f"resume of {out}: expected the options of {RUN_FILE}, got others: "
            f"{'; '.join(changed)}; to train with these, choose another OUT, or remove {out}"
        )
    logger.info("%s: resuming from %s", out, checkpoint)
    return checkpoint


def _check_only_begun(out: Path) -> None:
    """Refuse a folder with other files: the model card could replace one of them."""
    begun = {RUN_FILE, partial_name(Path(RUN_FILE)).name, CHECKPOINTS}
    others = sorted(path.name for path in out.iterdir() if path.name not in begun)
    if others:
        some = ", ".join(others[:3]) + (", ..." if len(others) > 3 else "")
        raise OutputError(
            f"output folder {out}: expected no files except those of an unfinished run, found "
            f"{len(others)} ({some}); choose another name or remove them"
        )


def _checked_model(config: FinetuneConfig, device: torch.device) -> PackedCheckpoint:
    """Open the model, and check every option before its weights are loaded."""
    if config.dtype == "float16" and device.type == "cpu":
        raise OptionError("dtype float16: expected a GPU; on a CPU take float32 or bfloat16")
    if config.offload_activations and device.type == "cpu":
        raise OptionError("offload_activations: expected a GPU, got a CPU")
    check_sharding(config)
    check_optimizer(config.optim)
    check_reporters(config.report_to)
    trainer_options(config.trainer)
    checkpoint = open_checkpoint(config.model)
    if config.mapped:
        check_mapped(checkpoint, str(device))
    for name in ("max_position_embeddings", "n_positions"):
        longest = checkpoint.config.get(name)
        if isinstance(longest, int) and config.seq_len > longest:
            raise OptionError(
                f"seq_len {config.seq_len}: expected at most {longest}, the {name} of "
                f"{config.model}"
            )
    if config.adapter is not None:
        read_adapter(config.adapter)
        return checkpoint
    shapes: dict[str, tuple[int, ...]] = {
        name if site.experts else name.removesuffix(".weight"): (
            (site.experts, *site.layout.shape) if site.experts else site.layout.shape
        )
        for name, site in checkpoint.record.items()
        if site.kind != "embedding"
    }
    modules = [name.removesuffix(".weight") for name in checkpoint.parameters]
    select_layers(shapes, config.targets, config.rank, modules)
    return checkpoint


def _put_adapter(model: nn.Module, config: FinetuneConfig) -> LoRASettings | None:
    """Put on a new adapter, and return its settings; or load the adapter to continue."""
    if config.adapter is not None:
        load_adapter(model, config.adapter, trainable=True)
        for _, layer in adapter_layers(model):
            layer.dropout = config.dropout
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
