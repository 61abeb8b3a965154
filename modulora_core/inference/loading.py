"""A model to run, whatever it is: packed or dense, with or without an adapter.

Opening reads configs and headers, so that a wrong request is refused at once; loading comes after all else is checked.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from modulora_core.checkpoints.checkpoint import (
    PackedCheckpoint,
    check_mapped,
    is_packed,
    load_dtype,
    load_model,
    open_checkpoint,
)
from modulora_core.devices import pick_device
from modulora_core.errors import AdapterError, CheckpointError, ModelError, OptionError
from modulora_core.models import ModelSource, open_model
from modulora_core.models.locate import locate
from modulora_core.models.quiet import quiet

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Opened:
    """A model that is known to be there, and whose weights haven't been read."""

    name: str
    origin: PackedCheckpoint | ModelSource
    adapter: str | None
    dtype: str
    device: str
    mapped: bool = False

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Raises ModelError when there is none, or a broken one."""
        try:
            return self.origin.tokenizer()
        except (OSError, ValueError) as error:
            raise ModelError(
                f"model {self.name}: its tokenizer can't be loaded: {str(error).splitlines()[0]}"
            ) from error

    def load(self) -> PreTrainedModel:
        """The model in evaluation mode, with its adapter. Raises CheckpointError when it can't be loaded."""
        if isinstance(self.origin, ModelSource):
            return _load_dense(self.origin, self.name, self.dtype, self.device)
        model = load_model(self.origin, dtype=self.dtype, device=self.device, mapped=self.mapped)
        if self.adapter is not None:
            from modulora_core.adapters.lora import load_adapter

            load_adapter(model, self.adapter)
        return model


def open_to_run(
    model: str,
    *,
    adapter: str | None = None,
    dtype: str = "auto",
    device: str | None = None,
    revision: str | None = None,
    mapped: bool = False,
) -> Opened:
    """Find MODEL.

    Args:
        model: a packed checkpoint, or anything that :func:`modulora_core.models.open_model` opens, which is then
            loaded dense: to compare with, for instance.
        adapter: a LoRA adapter in PEFT's format, a folder or a Hub id; for a packed model.
        dtype, device, mapped: as for :func:`modulora_core.checkpoints.checkpoint.load_model`; ``mapped`` for a packed model.

    Raises:
        RequestError: no such device, nothing is there, it can't be read, or a plugin is missing.
    """
    device = str(pick_device(device))
    load_dtype(dtype, device)  # refuses an unknown name
    location = locate(model, revision)
    if location.gguf is None and is_packed(location.folder):
        checkpoint = open_checkpoint(model, revision=revision)
        for site in checkpoint.record.sites:
            checkpoint.quantizer(site)
        if mapped:
            check_mapped(checkpoint, device)
        return Opened(model, checkpoint, adapter, dtype, device, mapped)
    if adapter is not None:
        raise AdapterError(f"adapter {adapter}: expected a packed model to put it on, and {model} is dense; give the folder that "
                           "`modulora quantize` wrote, or load both with peft")  # fmt: skip
    if mapped:
        raise OptionError(
            f"mapped: expected a packed model, and {model} is dense; quantize it first, or leave mapped out"
        )
    source = open_model(model, revision=revision)
    source.validate()
    return Opened(model, source, None, dtype, device)


def _load_dense(source: ModelSource, name: str, dtype: str, device: str) -> PreTrainedModel:
    # a GGUF file is read by our own stream: transformers' holds all of it twice, and draws bars that can't be turned off
    weights = None if source.location.gguf is None else dict(source.tensors())
    try:
        with quiet():
            loaded = type(source.skeleton()).from_pretrained(
                source.location.folder if weights is None else None, config=source.config, state_dict=weights,
                dtype=load_dtype(dtype, device), device_map={"": device}, trust_remote_code=False,
            )  # fmt: skip
    except (OSError, ValueError, RuntimeError) as error:
        raise CheckpointError(
            f"model {name}: transformers can't load it: {str(error).splitlines()[0]}"
        ) from error
    loaded.eval()
    return loaded
