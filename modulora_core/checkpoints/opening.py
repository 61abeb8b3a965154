"""Open MODEL, packed or dense. Opening reads only headers.

    open_model    whatever it is: a PackedCheckpoint, or a ModelSource if its weights are floats
    open_packed   the same, and refuses floats

:func:`modulora_core.models.open_dense` gives the floats that a quantizer packs.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from modulora_core.checkpoints.foreign.folder import packed_in_folder
from modulora_core.checkpoints.foreign.foreign_checkpoint import packed_in_file
from modulora_core.checkpoints.packed_checkpoint import PackedCheckpoint
from modulora_core.checkpoints.record import QUANT_METHOD, QuantizationRecord
from modulora_core.errors import ModelError
from modulora_core.models import ModelSource, open_dense
from modulora_core.models.config import config_values
from modulora_core.models.folders import no_config
from modulora_core.models.installed_formats import method_of, recognise, unread_method
from modulora_core.models.locate import Location, fetch_weights, locate
from modulora_core.models.safetensors_store import SafetensorsStore


def is_packed(folder: Path) -> bool:
    """Whether a folder is a packed checkpoint: ours, or of a format that a plugin reads."""
    config = config_values(folder)
    return own_record(folder, config) is not None or recognise(folder, config) is not None


def own_record(folder: Path, config: Mapping[str, Any]) -> QuantizationRecord | None:
    """The record in config.json, if it says that this package wrote the weights.

    Raises CheckpointError: the record is malformed.
    """
    found = config.get("quantization_config")
    if isinstance(found, Mapping) and found.get("quant_method") == QUANT_METHOD:
        return QuantizationRecord.from_json(found, folder / "config.json")
    return None


def open_model(
    model: str | Path | Location, *, revision: str | None = None
) -> PackedCheckpoint | ModelSource:
    """Open MODEL, whatever it is: packed weights stay packed. Headers are read once.

    Raises ModelError, CheckpointError, PluginError.
    """
    location = model if isinstance(model, Location) else locate(str(model), revision)
    if location.file is None:
        return _packed_folder(location) or open_dense(location)
    source = open_dense(location)  # its config, tokenizer and dense tensors serve packed rows too
    return packed_in_file(source) or source


def open_packed(model: str | Path | Location, *, revision: str | None = None) -> PackedCheckpoint:
    """As :func:`open_model`, for a packed model. Weights of another Hub model aren't downloaded.

    Raises ModelError, CheckpointError, PluginError.
    """
    location = model if isinstance(model, Location) else locate(str(model), revision)
    found = _packed_folder(location) if location.file is None else open_model(location)
    if not isinstance(found, PackedCheckpoint):
        raise ModelError(_not_packed(location))
    return found


def _packed_folder(location: Location) -> PackedCheckpoint | None:
    """The packed checkpoint in a folder or a Hub repository; None if config.json says floats."""
    config = config_values(location.folder)
    record = own_record(location.folder, config)
    if record is not None:
        location = fetch_weights(location)
        return PackedCheckpoint(location, config, record, SafetensorsStore(location.folder))
    known = recognise(location.folder, config)
    if known is None:
        return None
    known.reader().check(known.config)
    return packed_in_folder(fetch_weights(location), known)


def _not_packed(location: Location) -> str:
    config = {} if location.file is not None else config_values(location.folder)
    method = method_of(config)
    if method is not None:
        return unread_method(location.model, method)
    if location.file is None and not config:
        return no_config(location.folder)
    return (
        f"model {location.model}: it isn't quantized; quantize it first: "
        f"modulora quantize {location.model} OUT -q NAME (finetune -q NAME does both)"
    )
