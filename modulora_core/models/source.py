"""One model, wherever it comes from: its config, its parameters by name, and the stream of their values."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from modulora_core.errors import ModelError
from modulora_core.models.config import read_config
from modulora_core.models.conversion import build_skeleton
from modulora_core.models.gguf_store import GGUFFile, GGUFStore, gguf_config, read_gguf
from modulora_core.models.locate import Location, fetch_weights, locate
from modulora_core.models.quiet import quiet
from modulora_core.models.safetensors_store import SafetensorsStore
from modulora_core.models.tokenizer_files import TOKENIZER_FILES, copy_files, write_files
from modulora_core.models.weights import ParameterInfo, Progress, Weights

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from modulora_core.models.store import TensorStore


def open_model(model: str, *, revision: str | None = None, weights: bool = True) -> ModelSource:
    """Open MODEL: a folder of safetensors, a ``.gguf`` file, ``package:NAME`` or a Hub id.

    Only headers are read.

    Args:
        model: what the user wrote.
        revision: a branch, tag or commit of a Hub repository.
        weights: whether the weights are wanted. Without them a Hub model isn't downloaded, and only the
            config, the skeleton and the tokenizer can be had: enough for a memory plan.

    Raises:
        ModelError: nothing is there, transformers can't use it, it isn't a causal language model, or it is
            quantized already.
        CheckpointError: the weights are missing, truncated or broken.
        MissingExtraError: a package that this kind of model needs isn't installed.
    """
    location = locate(model, revision)
    with quiet():
        if location.gguf is not None:
            return _open_gguf(location, location.folder / location.gguf, weights)
        return _open_folder(location, weights)


@dataclass(frozen=True, slots=True)
class ModelSource:
    """A model that :func:`open_model` opened.

    Attributes:
        location: where its files are.
        config: transformers' config of the model that :meth:`skeleton` builds. ``config.dtype`` is what
            transformers loads it in, ``config.name_or_path`` is MODEL.
    """

    location: Location
    config: PretrainedConfig
    _weights: Weights | None
    _description: Mapping[str, Any]  # of the config and the tensors, for the fingerprint

    @property
    def parameters(self) -> Mapping[str, ParameterInfo]:
        """Every parameter and persistent buffer in the files, by its name in memory, in the model's order.

        Known from headers alone. Of tied names the first is listed only.
        """
        return self._need_weights().parameters

    def skeleton(self, *, buffers: bool = False) -> PreTrainedModel:
        """A new model on the meta device: names, shapes and dtypes, no memory.

        With ``buffers`` those that are computed and not stored, such as rotary frequencies, have their values on
        the CPU: what is needed to run a part of the model whose parameters are filled in.
        """
        with quiet():
            return build_skeleton(self.config, self.config.dtype, buffers=buffers)

    def validate(self) -> list[str]:
        """Compare the files' headers with the config; broken files were refused by :func:`open_model`.

        Returns:
            the tensors in the files that the model has no place for.

        Raises:
            CheckpointError: a parameter has no tensor in the files, or one of another shape.
        """
        self._need_weights().check()
        return list(self._need_weights().unexpected)

    def check_finite(self, progress: Progress | None = None) -> str:
        """Read every value once, a few MiB at a time.

        Returns:
            a SHA-256 of the values: it tells two finetunes of one model apart, as :meth:`identity` doesn't.

        Raises:
            WeightError: a tensor has NaN or Inf; the message names it.
        """
        return self._need_weights().check_finite(progress)

    def tensors(
        self, progress: Progress | None = None, *, names: Collection[str] | None = None
    ) -> Iterator[tuple[str, Tensor]]:
        """Stream every one of :attr:`parameters`: its name in memory and its value, in memory of its own.

        A decoder layer's parameters come together. One parameter exists at a time (while tensors are fused or
        split, those that are fused or split together), provided that the caller drops it before the next.

        Args:
            progress: called with the bytes of the files done so far, and all that there are.
            names: only these of :attr:`parameters`; other tensors aren't read.

        Raises:
            CheckpointError: a file was changed meanwhile.
        """
        return self._need_weights().stream(progress, names)

    @property
    def has_tokenizer(self) -> bool:
        """Whether there is anything to make a tokenizer of; a GGUF file has its own."""
        folder = self.location.folder
        return self.location.gguf is not None or any(
            (folder / name).is_file() for name in TOKENIZER_FILES
        )

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's tokenizer. Raises ModelError when there is none that transformers can read."""
        from transformers import AutoTokenizer

        if not self.has_tokenizer:
            # transformers makes an empty tokenizer of such a folder in some versions
            raise ModelError(
                f"model {self.location.model}: no tokenizer files, such as {TOKENIZER_FILES[0]}"
            )
        options = {} if self.location.gguf is None else {"gguf_file": self.location.gguf}
        try:
            with quiet():
                tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
                    self.location.folder, trust_remote_code=False, **options
                )
        except (
            Exception
        ) as error:  # each tokenizer class fails in its own way on missing or broken files
            reason = str(error).strip().split("\n")[0]
            raise ModelError(
                f"model {self.location.model}: no tokenizer that transformers can read: {reason}"
            ) from error
        return tokenizer

    def copy_tokenizer(self, out: Path) -> list[str]:
        """Put the tokenizer, the chat template and the generation config into ``out``.

        A folder's files are copied as they are; of a GGUF file they are written by transformers.

        Returns:
            the names of the files; empty when the model has none of them.
        """
        if self.location.gguf is None:
            return copy_files(self.location.folder, out)
        with quiet():
            return write_files(self.tokenizer(), self.config, out)

    def identity(self) -> dict[str, Any]:
        """Where this model comes from, for the record, as JSON.

        ``fingerprint`` is a SHA-256 of the config and of the tensors' names, dtypes and shapes. It tells
        models of other architectures or sizes apart, not two finetunes of one model: the values aren't
        read.
        """
        text = json.dumps(self._description, sort_keys=True, separators=(",", ":"))
        return {
            "kind": self.location.kind,
            "name": self.location.name,
            "revision": self.location.revision,
            "fingerprint": hashlib.sha256(text.encode()).hexdigest(),
        }

    def _need_weights(self) -> Weights:
        if self._weights is None:
            raise ModelError(
                f"model {self.location.model} was opened without its weights: open_model(weights=False)"
            )
        return self._weights


def _open_folder(location: Location, weights: bool) -> ModelSource:
    config, values = read_config(location.folder)
    if not weights:
        dtype = _dtype_of(config, None)
        return _source(
            location, build_skeleton(config, dtype).config, dtype, None, {"config": values}
        )
    location = fetch_weights(location)
    store = SafetensorsStore(location.folder)
    return fit(location, config, values, store)


def fit(
    location: Location, config: PretrainedConfig, values: dict[str, Any], store: TensorStore
) -> ModelSource:
    """The model of a config with the tensors of a store as its weights.

    Args:
        location: where they are.
        config: of the model; values: what config.json says, for the fingerprint.
        store: tensors under the names that files have.
    """
    dtype = _dtype_of(config, store)
    model = build_skeleton(config, dtype)
    found = Weights(store, model, dtype)
    if found.tied_but_different():
        model = build_skeleton(_untied(model.config), dtype)
        found = Weights(store, model, dtype)
    stored = {name: [tensor.stored_as, tensor.shape] for name, tensor in store.tensors.items()}
    return _source(location, model.config, dtype, found, {"config": values, "tensors": stored})


def _open_gguf(location: Location, path: Path, weights: bool) -> ModelSource:
    # reading a header takes seconds, and transformers reads it once more for the config
    file = read_gguf(path) if weights else GGUFFile(path, "", {})
    config, values = gguf_config(file)
    model = build_skeleton(config, file.dtype)
    if not weights:
        return _source(location, model.config, file.dtype, None, {})
    store = GGUFStore(file, model, values)
    found = Weights(store, model, file.dtype, store.transforms)
    stored = {name: [tensor.kind.name, tensor.shape] for name, tensor in file.tensors.items()}
    description = {"architecture": file.architecture, "tensors": stored}
    return _source(location, model.config, file.dtype, found, description)


def _source(
    location: Location,
    config: PretrainedConfig,
    dtype: torch.dtype,
    weights: Weights | None,
    description: dict[str, Any],
) -> ModelSource:
    config.name_or_path, config.dtype = location.model, dtype
    return ModelSource(location, config, weights, description)


def _dtype_of(config: PretrainedConfig, store: TensorStore | None) -> torch.dtype:
    """What transformers loads it in: the config's dtype, else the first floating tensor's, else fp32."""
    if config.dtype is not None:
        return (
            config.dtype if isinstance(config.dtype, torch.dtype) else getattr(torch, config.dtype)
        )
    tensors = store.tensors.values() if store is not None else ()
    return next(
        (tensor.dtype for tensor in tensors if tensor.dtype.is_floating_point), torch.float32
    )


def _untied(config: PretrainedConfig) -> PretrainedConfig:
    for part in (config, config.get_text_config()):
        part.tie_word_embeddings = False
    return config
