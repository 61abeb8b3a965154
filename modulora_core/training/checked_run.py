"""Check the request of a finetuning run, and read its data, before any weight is loaded."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from modulora_core.calibration import CalibrationConfig
from modulora_core.checkpoints.foreign.writers import base_file, file_writer
from modulora_core.checkpoints.opening import open_packed
from modulora_core.checkpoints.packed_checkpoint import PackedCheckpoint
from modulora_core.data.sources import Source, source_name
from modulora_core.distributed import pick_device, world_size
from modulora_core.errors import OptionError
from modulora_core.hf.load_model import check_mapped
from modulora_core.hf.peft_format import read_adapter
from modulora_core.lora.adapting import selected_layers
from modulora_core.models.config import vocabulary_of, window_of
from modulora_core.quantization.cache import CachedModel
from modulora_core.registry import Choice
from modulora_core.training.arguments import check_optimizer, total_steps, warn_of_settings
from modulora_core.training.config import FinetuneConfig
from modulora_core.training.devices import check_device
from modulora_core.training.methods import Method
from modulora_core.training.resuming import CHECKPOINTS, Begun, begun, check_examples, check_new
from modulora_core.training.sharding import check_fsdp_version, is_sharded
from modulora_core.training.trainer_options import check_reporters

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckedRun:
    """A run whose request was checked; no weight is loaded yet.

    Attributes:
        config: the run, with a ``seq_len`` in the model's window.
        data: the name of the training data.
        examples: the examples of ``"train"``, and of ``"eval"`` if there is evaluation data.
        method: the method, which has begun unless the run is finished.
        begun: the part of the run that ``out`` has.
    """

    config: FinetuneConfig
    out: Path
    device: torch.device
    base: PackedCheckpoint | CachedModel
    tokenizer: Any
    data: str
    examples: dict[str, Any]
    steps: int
    method: Method
    begun: Begun

    @property
    def model(self) -> str:
        """The packed model: the config's, or its folder in the cache."""
        return str(self.base.folder) if isinstance(self.base, CachedModel) else self.config.model


def checked_run(
    config: FinetuneConfig,
    data: Source | None,
    eval_data: Source | None,
    out: Path,
    resume: bool,
    method: Method | None = None,
) -> CheckedRun:
    """Check the request, and read the data.

    Raises RequestError: as :func:`modulora_core.finetune`.
    """
    sources, method = _sources(config, data, eval_data), method or Method()
    device = pick_device()
    if not resume:
        check_new(out)  # a bad one is refused before a model is downloaded
    method.check(config)
    base = checked_model(config, device)
    model_config = base.transformers_config()
    config = config.in_window(window_of(model_config), config.model)
    if config.adapter is not None and "dropout" not in config.model_fields_set:
        config = config.model_copy(update={"dropout": read_adapter(config.adapter).dropout})
    found = begun(out, config) if resume else Begun()
    if not found.finished:
        check_adapter(config, base)
        check_lora_file(config, base)
    tokenizer = base.tokenizer()
    vocabulary = vocabulary_of(model_config)
    examples = {
        name: method.examples(source, config, tokenizer, vocabulary)
        for name, source in sources.items()
    }
    if config.packing and examples["train"].report.format != "text":  # its windows are full
        examples["train"] = examples["train"].joined(config.seq_len)
    check_examples(out, examples, out if found.finished else found.checkpoint)
    steps = total_steps(config, len(examples["train"]), world_size())
    if found.finished:
        logger.info("%s: it is finished; nothing is left to resume", out)
    else:
        method.begin(config, examples["train"], steps, tokenizer, vocabulary, out / CHECKPOINTS)
        warn_of_settings(config, examples["train"], steps)
    return CheckedRun(
        config=config, out=out, device=device, base=base, tokenizer=tokenizer,
        data=source_name(sources["train"]), examples=examples, steps=steps,
        method=method, begun=found,
    )  # fmt: skip


def _sources(
    config: FinetuneConfig, data: Source | None, eval_data: Source | None
) -> dict[str, Source]:
    """The sources ``"train"`` and perhaps ``"eval"``. Raises OptionError."""
    found: dict[str, Source] = {}
    for key, name, own, given in (
        ("train", "data", config.data, data),
        ("eval", "eval_data", config.eval_data, eval_data),
    ):
        if own is not None and given is not None:
            raise OptionError(f"{name}: expected it in the config or beside it, got both")
        if (source := own if given is None else given) is not None:
            found[key] = source
    if config.eval_every is not None and "eval" not in found:
        raise OptionError(f"eval_every is {config.eval_every}: expected eval_data, got none")
    if "train" not in found:
        raise OptionError("data: expected training data, got none; give --data SOURCE")
    return found


def checked_model(config: FinetuneConfig, device: torch.device) -> PackedCheckpoint | CachedModel:
    """Open the packed model, or the dense model that will be packed. Raises RequestError."""
    shard = is_sharded(config)
    check_device(config, device.type, processes=world_size(), shard=shard)
    if shard:
        check_fsdp_version()
    check_optimizer(config.optim)
    check_reporters(config.report_to)
    checkpoint: PackedCheckpoint | CachedModel
    if config.quantizer is not None:
        choice = Choice.parse(config.quantizer, "quantizer")
        text = CalibrationConfig(config.calibration) if config.calibration else None
        checkpoint = CachedModel(config.model, choice, calibration=text, quality=config.quality)
    else:
        checkpoint = open_packed(config.model)
        if config.mapped:
            check_mapped(checkpoint, str(device))
    return checkpoint


def check_adapter(config: FinetuneConfig, checkpoint: PackedCheckpoint | CachedModel) -> None:
    """Refuse targets that the model lacks, or an adapter to continue that can't be read."""
    if config.adapter is None:
        selected_layers(checkpoint.outline, config.targets, config.rank)
    else:
        read_adapter(config.adapter)


def check_lora_file(config: FinetuneConfig, checkpoint: PackedCheckpoint | CachedModel) -> None:
    """Refuse ``lora_file`` where the file couldn't be written or used."""
    if config.lora_file is None:
        return
    writer = file_writer(config.lora_file)
    writer.check_adapter_file(Path(config.lora_file))
    spec = writer.spec
    continued = None if config.adapter is None else read_adapter(config.adapter)
    if config.train_scales or (continued is not None and continued.has_channel_scales):
        raise OptionError("lora_file: it holds no channel scales; train without them")
    if not isinstance(checkpoint, PackedCheckpoint) or not base_file(checkpoint, config.model):
        raise OptionError(
            f"lora_file: expected a file *{spec.file_suffix} as MODEL, got {config.model}; write "
            f"the file later: modulora convert {config.out} {config.lora_file} --to {spec.name} "
            f"--model FILE{spec.file_suffix}"
        )
