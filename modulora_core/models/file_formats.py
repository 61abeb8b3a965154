"""Open a whole model in one file: the classes that a plugin implements, and the search for them.

A plugin gives a ``file_suffix`` in its :class:`~modulora_core.spec.FormatSpec`, and implements a
:class:`FileFormat` whose :class:`ModelFile` has config, tokenizer and tensors. Such a file can then
be finetuned, evaluated, quantized again and merged, as a folder can.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from modulora_core import registry
from modulora_core.errors import ModelError
from modulora_core.models.formats import ForeignWeight, file_plugin, unread_file
from modulora_core.models.sites import LinearSite
from modulora_core.models.store import TensorStore
from modulora_core.models.weights import Weights
from modulora_core.spec import FormatSpec

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["FileFormat", "FileTensors", "ModelFile", "PackedTensors", "PartStore"]


class FileTensors(TensorStore, Protocol):
    """The tensors of a file, dequantized."""

    @property
    def transforms(self) -> list[Any] | None:
        """Transformers' weight transforms for them; None if their names are those in memory."""


class PartStore(TensorStore, Protocol):
    """The tensors of packed weights. The first dimension of a stack's tensors counts matrices."""

    def read_part(self, name: str, index: int) -> Tensor:
        """Read one matrix's part of a stack's tensor. Raises CheckpointError, as :meth:`read`."""


@dataclass(frozen=True, slots=True)
class PackedTensors:
    """The packed weights of a file, by the names of their parameters in memory, and a store of
    their tensors."""

    weights: Mapping[str, ForeignWeight]
    store: PartStore


class ModelFile(ABC):
    """An opened file. Its header is parsed once, when it is opened; values are read on request.

    Attributes:
        config: transformers' config of the model.
        dtype: the dtype that transformers loads the model in.
        description: the facts that identify the model, as JSON: its fingerprint is made of them.
    """

    config: PretrainedConfig
    dtype: torch.dtype
    description: Mapping[str, Any]

    @abstractmethod
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's tokenizer. May raise any error for a file that has none."""

    @abstractmethod
    def tensors(self, model: PreTrainedModel) -> FileTensors:
        """All tensors for ``model``, the model of :attr:`config` on the meta device.

        Raises:
            ModelError: transformers can't use these tensors.
            CheckpointError: they don't fit the config.
        """

    def check_unplaced(self, model: PreTrainedModel, names: Sequence[str]) -> None:  # noqa: B027
        """Refuse tensors that ``model`` has no place for, or warn; the default allows any.

        Raises:
            ModelError: the model would be another one without a tensor.
        """

    @abstractmethod
    def packed(self, source: Weights, sites: Iterable[LinearSite]) -> PackedTensors:
        """The weights that the file holds packed.

        Args:
            source: the parameters of the model, whose store is the result of :meth:`tensors`.
            sites: the parameters that may be packed.
        """


class FileFormat(ABC):
    """A format of files that hold a whole model. Subclass it, and name it in the plugin's
    :class:`~modulora_core.spec.FormatSpec`. The spec's ``writer`` names the way back."""

    def __init__(self, spec: FormatSpec) -> None:
        self.spec = spec

    @abstractmethod
    def open(self, path: Path) -> ModelFile:
        """Open a file: read and check its header.

        Raises:
            ModelError: the file holds no model, or transformers can't use it.
            CheckpointError: the file is truncated or damaged.
        """


def open_file(path: Path) -> ModelFile:
    """Open a file that an installed plugin reads.

    Raises:
        ModelError: no installed plugin reads it, or as :meth:`FileFormat.open`.
        CheckpointError: the file is truncated or damaged.
        PluginError: the plugin can't be used.
    """
    found = file_plugin(path)
    if found is None:
        raise ModelError(f"{path}: {unread_file(path)}")
    entry, spec = found
    kind = registry.import_class(entry, spec.location, FileFormat)  # type: ignore[type-abstract]
    return kind(spec).open(path)
