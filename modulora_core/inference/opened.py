"""Open a model to run it: packed or dense, with or without an adapter.

Opening reads configs, headers and the adapter, so that a wrong request is refused at once. The
weights are loaded later, after every other check.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from modulora_core.arguments import checked
from modulora_core.checkpoints.opening import open_model
from modulora_core.checkpoints.packed_checkpoint import PackedCheckpoint
from modulora_core.distributed import pick_device
from modulora_core.errors import AdapterError, ModelError, OptionError
from modulora_core.hf.load_adapter import adapter_for, put_on
from modulora_core.hf.load_model import check_mapped, load_dense, load_model, resolved_dtype
from modulora_core.hf.peft_format import SavedAdapter
from modulora_core.models import ModelSource
from modulora_core.models.config import window_of


@dataclass(frozen=True)
class Opened:
    """A model that was found; its weights are not loaded yet. Make one with :func:`open_to_run`."""

    name: str
    origin: PackedCheckpoint | ModelSource
    adapter: SavedAdapter | None
    dtype: str | torch.dtype
    device: str
    mapped: bool = False
    parity_check: bool = True

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's tokenizer. Raises ModelError if it is missing or broken."""
        return self.origin.tokenizer()

    @property
    def window(self) -> int | None:
        """The longest sequence that the model takes; None where its config says nothing."""
        origin = self.origin
        config = origin.config if isinstance(origin, ModelSource) else origin.transformers_config()
        return window_of(config)

    def load(self) -> PreTrainedModel:
        """Load the model in evaluation mode, with its adapter. Raises CheckpointError."""
        if isinstance(self.origin, ModelSource):
            return load_dense(self.origin, dtype=self.dtype, device=self.device)
        model = load_model(
            self.origin, dtype=self.dtype, device=self.device, mapped=self.mapped,
            parity_check=self.parity_check,
        )  # fmt: skip
        if self.adapter is not None:
            put_on(model, self.adapter)
        return model


Runnable = str | Path | Opened | tuple[PreTrainedModel, PreTrainedTokenizerBase]
"""MODEL as on the command line, the result of :func:`open_to_run`, or (model, tokenizer)."""


@checked
def open_to_run(
    model: str | Path,
    *,
    adapter: str | Path | None = None,
    dtype: str | torch.dtype = "auto",
    device: str | None = None,
    revision: str | None = None,
    mapped: bool = False,
    parity_check: bool = True,
) -> Opened:
    """Find a model and check the request. The result's ``load()`` loads the weights.

    Args:
        model: a packed checkpoint, or any model that :func:`modulora_core.models.open_dense` opens,
            which is then loaded dense.
        adapter: a LoRA adapter in PEFT's format, a folder or Hub id, for a packed model.
        dtype, device, mapped, parity_check: as for
            :func:`modulora_core.hf.load_model.load_model`; ``mapped`` is for a packed one.
        revision: a revision of a Hub model.

    Raises:
        RequestError: the model, the device or a plugin is missing, a file cannot be read, or the
            adapter does not fit the model.
    """
    model, device = os.fspath(model), str(pick_device(device))
    resolved_dtype(dtype, device)  # refuses an unknown name
    found = open_model(model, revision=revision)
    if isinstance(found, PackedCheckpoint):
        found.check_plugins()
        if mapped:
            check_mapped(found, device)
        saved = None if adapter is None else adapter_for(found, adapter)
        return Opened(model, found, saved, dtype, device, mapped, parity_check)
    if adapter is not None:
        raise AdapterError(
            f"adapter {adapter}: expected a packed model for it, and {model} is dense; give the "
            "folder that `modulora quantize` wrote, or load both with peft"
        )
    if mapped:
        raise OptionError(
            f"mapped: expected a packed model, and {model} is dense; quantize it first, or leave "
            "mapped out"
        )
    found.check_whole()
    return Opened(model, found, None, dtype, device)


def tokenizer_and_loader(
    model: Runnable, adapter: str | Path | None = None
) -> tuple[PreTrainedTokenizerBase, Callable[[], PreTrainedModel]]:
    """The model's tokenizer, and a function that gives the model with its weights.

    Between the two the caller checks its request, which needs the tokenizer alone.

    Args:
        adapter: a LoRA adapter in PEFT's format, if ``model`` is a name.

    Raises:
        RequestError: as :func:`open_to_run`; or ``model`` is none of its types.
    """
    if isinstance(model, str | Path):
        model = open_to_run(model, adapter=adapter)
    elif adapter is not None:
        raise AdapterError(
            f"adapter {adapter}: expected a model's name with it, got an open model; open it with "
            "the adapter, or put the adapter on with load_adapter"
        )
    if isinstance(model, Opened):
        return model.tokenizer, model.load
    if not (isinstance(model, tuple) and len(model) == 2):
        raise ModelError(
            "model: expected a name, the result of open_to_run, or (model, tokenizer), got "
            f"{model!r:.80}"
        )
    loaded, tokenizer = model
    return tokenizer, lambda: loaded
