"""Check the options of a run against the model and the device, before weights are loaded."""

from __future__ import annotations

from pathlib import Path

import torch

from modulora_core.calibration import CalibrationConfig
from modulora_core.checkpoints.foreign.files import base_file, file_writer
from modulora_core.checkpoints.opening import open_packed
from modulora_core.checkpoints.packed_checkpoint import PackedCheckpoint
from modulora_core.distributed import world_size
from modulora_core.errors import OptionError
from modulora_core.hf.load_model import check_mapped
from modulora_core.hf.peft_format import read_adapter
from modulora_core.lora.adapting import selected_layers
from modulora_core.quantization.cache import CachedModel
from modulora_core.registry import Choice
from modulora_core.training.arguments import check_optimizer
from modulora_core.training.config import FinetuneConfig
from modulora_core.training.devices import check_device
from modulora_core.training.sharding import check_fsdp_version, is_sharded
from modulora_core.training.trainer_options import check_reporters


def checked_model(config: FinetuneConfig, device: torch.device) -> PackedCheckpoint | CachedModel:
    """Open the packed model, or the dense model that will be packed.

    Raises:
        RequestError: the model cannot be opened, or an option does not fit it or the device.
    """
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
    """Refuse targets that the model lacks, or an adapter to continue that can't be read.

    Raises:
        AdapterError, OptionError: as :func:`modulora_core.add_lora`, or ``read_adapter``.
        ModelError: the model has no packed layers, or transformers can't build it.
    """
    if config.adapter is None:
        selected_layers(checkpoint.outline, config.targets, config.rank)
    else:
        read_adapter(config.adapter)


def check_lora_file(config: FinetuneConfig, checkpoint: PackedCheckpoint | CachedModel) -> None:
    """Refuse ``lora_file`` where the file couldn't be written or used.

    Raises:
        OutputError: it exists; OptionError: it doesn't fit the model or the adapter.
        RequestError: no plugin writes it, or the adapter to continue can't be read.
    """
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
