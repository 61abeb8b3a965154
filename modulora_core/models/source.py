"""Open a model, wherever it comes from: its config, its tokenizer, its parameters by name."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from modulora_core.errors import CheckpointError, ModelError
from modulora_core.models import tokenizer
from modulora_core.models.config import read_config
from modulora_core.models.formats import ModelFile
from modulora_core.models.locate import FoundFile, Location, fetch_weights, locate
from modulora_core.models.safetensors_store import SafetensorsStore
from modulora_core.models.skeleton import PACK_IN_PYTHON, build_skeleton, untie
from modulora_core.models.store import StoredTensor, TensorStore
from modulora_core.models.weights import Weights
from modulora_core.progress import quiet

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase


class ModelSource(Weights):
    """A model that :func:`open_dense` opened: its weights with config, tokenizer and origin.

    Attributes:
        location: the place of its files.
        config: transformers' config of the model that :meth:`skeleton` builds. ``config.dtype`` is
            the dtype that transformers loads it in, ``config.name_or_path`` is MODEL.
        file: the opened file, of a model in one file.
    """

    def __init__(
        self,
        location: Location,
        store: TensorStore,
        model: PreTrainedModel,
        dtype: torch.dtype,
        described: Mapping[str, Any],
        transforms: list[Any] | None = None,
        file: ModelFile | None = None,
    ) -> None:
        super().__init__(store, model, dtype, transforms)
        self.location, self.config, self._described = location, model.config, described
        self.file = file
        self.config.name_or_path, self.config.dtype = location.model, dtype

    @property
    def outline(self) -> PreTrainedModel:
        """The model on the meta device: names, shapes and dtypes. Do not change it."""
        return self._model

    def skeleton(self, *, buffers: bool = False) -> PreTrainedModel:
        """A new model on the meta device, to be changed: :attr:`outline` is for looking.

        With ``buffers``, computed buffers such as rotary frequencies have their values on the CPU.
        A part of the model then runs as soon as its parameters are filled in.
        """
        with quiet():
            return build_skeleton(self.config, self.config.dtype, buffers=buffers)

    @property
    def has_tokenizer(self) -> bool:
        """Whether there are files of a tokenizer; a model in one file has its own."""
        return self.file is not None or tokenizer.has_tokenizer(self.location.folder)

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's tokenizer. Raises ModelError if there is none that transformers can read."""
        if self.file is not None:
            return tokenizer.checked_tokenizer(self.location.model, self.file.tokenizer)
        return tokenizer.load_tokenizer(self.location.model, self.location.folder)

    def copy_tokenizer(self, out: Path) -> list[str]:
        """Put the tokenizer, the chat template and the generation config into ``out``.

        A folder's files are copied as they are; transformers writes them for a model in one file.

        Returns:
            the names of the files; empty when the model has none of them.
        """
        if self.file is None:
            return tokenizer.copy_tokenizer(self.location.folder, out)
        return tokenizer.write_tokenizer(self.tokenizer(), self.config, out)

    def identity(self) -> dict[str, Any]:
        """The model's origin for a checkpoint's record, as JSON.

        ``fingerprint`` is a SHA-256 of the config and of the tensors' names, dtypes and shapes. It
        does not distinguish two finetunes of one model: no values are read.
        """
        text = json.dumps(self._described, sort_keys=True, separators=(",", ":"))
        return {
            "kind": self.location.kind,
            "name": self.location.name,
            "revision": self.location.revision,
            "fingerprint": hashlib.sha256(text.encode()).hexdigest(),
        }

    def file_stats(self) -> dict[str, Any]:
        """The folder, and size and time of change of each file of weights, as JSON.

        They distinguish the contents on this machine, and no values are read.
        """
        folder, names = self.location.folder, {each.file for each in self.store.tensors.values()}
        files = {name: (folder / name).stat() for name in sorted(names)}
        found = {name: [stat.st_size, stat.st_mtime_ns] for name, stat in files.items()}
        return {"folder": str(folder.resolve()), "files": found}


def open_dense(model: str | Location, *, revision: str | None = None) -> ModelSource:
    """Open MODEL as floats: a folder of safetensors, a file, ``package:NAME`` or a Hub id.

    Only headers are read. The weights of a file are dequantized as they are read.

    Args:
        model: MODEL as the user wrote it, or its place.
        revision: a branch, tag or commit of a Hub repository.

    Raises:
        ModelError: nothing is there, transformers can't use it, it isn't a causal language model,
            or it is quantized already.
        CheckpointError: the weights are missing, truncated or broken, or the causal language model
            has no place for some of them.
    """
    location = model if isinstance(model, Location) else locate(model, revision)
    with quiet():
        if location.file is not None:
            return _open_file(location, location.file)
        config, values = read_config(location.folder)
        location = fetch_weights(location)
        store = SafetensorsStore(location.folder)
        dtype = load_dtype(config, store.tensors.values())
        source = source_with(location, build_skeleton(config, dtype), dtype, values, store)
    refuse_integers(source)
    _refuse_unplaced(source)
    return source


def refuse_integers(source: ModelSource) -> None:
    """Refuse integers in the place of weights, which transformers casts without a word."""
    floats = {name for name, info in source.parameters.items() if info.dtype.is_floating_point}
    stored = source.store.tensors
    for name in sorted(floats & stored.keys()):
        tensor = stored[name]
        if not tensor.dtype.is_floating_point:
            raise CheckpointError(
                f"{tensor.file}: {name}: expected floating-point values, got {tensor.stored_as}"
            )


def _refuse_unplaced(source: ModelSource) -> None:
    """Refuse a folder of a larger model, such as an encoder's, which would be left out."""
    if source.unplaced:
        source.check_whole()  # another architecture lacks parameters too
        parts = dict.fromkeys(name.split(".layers.")[0] for name in source.unplaced)
        kind = type(source.outline).__name__
        named = ", ".join([source.unplaced[0], *[*parts][1:3]])
        raise CheckpointError(
            f"model {source.location.model}: expected the tensors of {kind}, got "
            f"{len(source.unplaced)} that it has no place for, such as {named}; {PACK_IN_PYTHON}"
        )


def source_with(
    location: Location,
    skeleton: PreTrainedModel,
    dtype: torch.dtype,
    values: dict[str, Any],
    store: TensorStore,
) -> ModelSource:
    """The model of a skeleton with the tensors of a store; config.json has ``values``."""
    stored = {name: [tensor.stored_as, tensor.shape] for name, tensor in store.tensors.items()}
    described = {"config": values, "tensors": stored}
    source = ModelSource(location, store, skeleton, dtype, described)
    if source.ties_hold():
        return source
    untie(skeleton)
    return ModelSource(location, store, skeleton, dtype, described)


def _open_file(location: Location, found: FoundFile) -> ModelSource:
    file = found.open()
    model = build_skeleton(file.config, file.dtype)
    store, transforms = file.tensors(model), file.transforms(model)
    source = ModelSource(location, store, model, file.dtype, file.description, transforms, file)
    file.check_unplaced(model, source.unplaced)
    return source


def load_dtype(config: PretrainedConfig, stored: Iterable[StoredTensor]) -> torch.dtype:
    """The dtype of loading: the config's, else of the first ``stored`` float, else fp32."""
    if config.dtype is not None:
        named = getattr(torch, str(config.dtype).removeprefix("torch."), None)
        if not isinstance(named, torch.dtype) or not named.is_floating_point:
            raise ModelError(
                f"config.json: dtype: expected a floating-point dtype, got {config.dtype!r}"
            )
        return named
    found = (tensor.dtype for tensor in stored)
    return next((dtype for dtype in found if dtype.is_floating_point), torch.float32)
