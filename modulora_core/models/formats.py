"""The classes that a plugin implements to read and write other tools' checkpoint formats.

A plugin returns a :class:`FormatSpec` from the hook ``modulora_formats``, and implements a
:class:`CheckpointFormat`, or a :class:`FormatReader` if it doesn't write the format. The core finds
the linear layers, streams a layer at a time, and keeps config, tokenizer and dense tensors. A
foreign folder can then be finetuned, evaluated and merged as it is, and ``modulora convert``
rewrites it.

A format of files that hold a whole model has a ``file_suffix`` in its
:class:`FormatSpec`, which names a :class:`ModelFile`: an opened file with
config, tokenizer and tensors. Such a file can be used as a folder can.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import torch
from torch import Tensor

from modulora_core.errors import CheckpointError, ModelError
from modulora_core.hookspecs import FormatSpec
from modulora_core.models.sites import LinearSite
from modulora_core.models.store import TensorStore, is_finite
from modulora_core.models.weights import Weights
from modulora_core.spec import PackedLayout, PackedWeight, Quantizer, TensorLayout

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

__all__ = [
    "CheckpointFormat", "ForeignWeight", "FormatReader", "FormatSpec", "ModelFile", "PackedTensors",
    "PartStore", "StoredWeight", "check_tensors", "read_finite",
]  # fmt: skip

Read = Callable[[str], Tensor]
"""Reads a tensor by its name."""


@dataclass(frozen=True, slots=True)
class ForeignWeight:
    """One weight in another tool's files, or a stack of them. Large tensors aren't read yet."""

    tensors: tuple[str, ...]
    """The names of its tensors in the files. The first dimension of a stack's tensors counts its
    matrices."""
    quantizer: Quantizer
    """The quantizer that reads it, with the options that the files imply."""
    layout: PackedLayout
    """The layout of the packed weight that :attr:`unpack` returns."""
    unpack: Callable[[Read], PackedWeight] = field(repr=False)
    """Makes the packed weight. It raises CheckpointError for damaged tensors. For a stack it makes
    one matrix, and reads only the part of each tensor that the matrix has."""
    experts: int | None = None
    """The number of matrices in a stack of experts, else None."""
    cut: Callable[[tuple[int, int]], ForeignWeight] | None = field(default=None, repr=False)
    """Makes the weight without padding, ``(out, in)`` as the model has it, for a format that pads
    weights. It raises CheckpointError if padding doesn't explain the sizes."""


@dataclass(frozen=True, slots=True)
class StoredWeight:
    """One weight of a checkpoint of ours that is to be written in a foreign format."""

    module: str
    """The dotted path of its layer: ``"model.layers.0.mlp.up_proj"``. Of a stack of experts, the
    name of the parameter."""
    quantizer: Quantizer
    layout: PackedLayout
    read: Read = field(repr=False)
    """Reads one of its packed tensors. Of a stack, ``"0.NAME"`` is of its first matrix."""
    experts: int | None = None
    """The number of matrices in a stack of experts, each with this layout, else None."""
    transposed: bool = False
    """Whether the model's code sees each matrix as ``[in, out]``."""
    bias: TensorLayout | None = None
    """The bias of the layer, which the core writes as it is."""

    def packed(self, matrix: int | None = None) -> PackedWeight:
        """Read the whole packed weight, or one matrix of a stack."""
        prefix = "" if matrix is None else f"{matrix}."
        return self.layout.fill({name: self.read(prefix + name) for name in self.layout.tensors})


class FormatReader(ABC):
    """A foreign format that is only read. Subclass it, and name it in the plugin's
    :class:`FormatSpec`.

    A class may implement several formats: ``spec`` is the format to read.

    Attributes:
        parts: layers that such files may store in parts, by the last word of their names, and the
            words of the parts in the order of rows: ``{"qkv": ("q", "k", "v")}``.
    """

    parts: ClassVar[Mapping[str, tuple[str, ...]]] = {}

    def __init__(self, spec: FormatSpec) -> None:
        self.spec = spec

    def check(self, config: Mapping[str, Any]) -> None:  # noqa: B027 - by default, any will do
        """Refuse a folder by its quantization config, before its weights are downloaded.

        Raises:
            ModelError: the config asks for something that isn't implemented; the message names it.
        """

    @abstractmethod
    def weights(
        self, config: Mapping[str, Any], tensors: Mapping[str, TensorLayout], read: Read
    ) -> Mapping[str, ForeignWeight]:
        """The quantized layers of a folder, by the dotted paths that its files use.

        A stack of experts has the name of its parameter.

        Args:
            config: the folder's quantization config. A folder that is known by one of the spec's
                ``config_keys`` gives all of config.json.
            tensors: every tensor of the files, from their headers.
            read: reads one tensor. Read only small tensors that a layout or a check needs: this
                method runs whenever the folder is opened.

        Raises:
            ModelError: the config asks for something that isn't implemented; the message names it.
            CheckpointError: tensors that are missing, of other shapes, or damaged.
        """


class CheckpointFormat(FormatReader):
    """A foreign format that is read and written. Subclass it in a plugin.

    Attributes:
        stacks: whether it holds stacks of experts.
        conv1d: whether its readers know GPT-2's ``Conv1D``, whose parameter is ``[in, out]``.
        dtype: the dtype in which other tools dequantize its weights, for config.json. None: the
            model's own.
    """

    stacks: ClassVar[bool] = False
    conv1d: ClassVar[bool] = True
    dtype: ClassVar[str | None] = None

    def check_packed_by(self, quantizer: str, weight: StoredWeight) -> None:
        """Refuse a weight of any other quantizer. Raises ModelError."""
        if weight.quantizer.spec.name != quantizer:
            raise ModelError(
                f"packed by {weight.quantizer.spec.name}; {self.spec.name} holds weights of "
                f"{quantizer} only. Unpack the model with `modulora merge`, and quantize it again"
            )

    @abstractmethod
    def plan(self, weight: StoredWeight) -> dict[str, TensorLayout]:
        """The tensors that ``weight`` becomes, by the last part of their names in the files:
        ``MODULE.part``, or ``PARAMETER_part`` for a stack of experts.

        Raises:
            ModelError, ShapeError: this format can't hold it; the message says why, and what to do.
        """

    @abstractmethod
    def tensors(self, weight: StoredWeight) -> dict[str, Tensor]:
        """The values of the tensors that :meth:`plan` announced."""

    @abstractmethod
    def config(self, weights: list[StoredWeight], kept: list[str]) -> dict[str, Any]:
        """The quantization config of a folder with ``weights``; layers ``kept`` are dense."""


def check_tensors(
    expected: Mapping[str, TensorLayout], found: Mapping[str, TensorLayout], by: str
) -> None:
    """Refuse tensors of a folder that are missing, or of another dtype or shape.

    Args:
        expected: by name; ``found``: every tensor of the files.
        by: the part of the folder that says so, for the message.

    Raises CheckpointError: with the first such tensor.
    """
    for name, layout in expected.items():
        got = found.get(name)
        if got != layout:
            raise CheckpointError(f"{name}: expected {layout} by {by}, got {got or 'nothing'}")


def read_finite(read: Read, name: str) -> Tensor:
    """Read a tensor of scales. Raises CheckpointError for NaN or Inf in it."""
    tensor = read(name)
    if not is_finite(tensor):
        raise CheckpointError(
            f"{name}: expected finite values, got NaN or Inf; the file is damaged"
        )
    return tensor


class PartStore(Protocol):
    """The tensors of packed weights. The first dimension of a stack's tensors counts matrices."""

    def read(self, name: str) -> Tensor:
        """Read a tensor. Raises CheckpointError if the file ends too early."""

    def read_part(self, name: str, index: int) -> Tensor:
        """Read one matrix's part of a stack's tensor. Raises CheckpointError, as :meth:`read`."""


@dataclass(frozen=True, slots=True)
class PackedTensors:
    """The packed weights of a file, by the names of their parameters in memory, and a store of
    their tensors."""

    weights: Mapping[str, ForeignWeight]
    store: PartStore


class ModelFile(ABC):
    """An opened file that holds a whole model. Subclass it, and name it in the plugin's
    :class:`FormatSpec`. The spec's ``writer`` names the way back.

    Its header is parsed once, when it is opened; values are read on request.

    Attributes:
        config: transformers' config of the model.
        dtype: the dtype that transformers loads the model in.
        description: the facts that identify the model, as JSON: its fingerprint is made of them.
    """

    config: PretrainedConfig
    dtype: torch.dtype
    description: Mapping[str, Any]

    @abstractmethod
    def __init__(self, path: Path) -> None:
        """Open a file: read and check its header.

        Raises:
            ModelError: the file holds no model, or transformers can't use it.
            CheckpointError: the file is truncated or damaged.
        """

    @abstractmethod
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's tokenizer. May raise any error for a file that has none."""

    @abstractmethod
    def tensors(self, model: PreTrainedModel) -> TensorStore:
        """All tensors for ``model``, the model of :attr:`config` on the meta device, dequantized.

        They have their names in memory, or names that :meth:`transforms` turns into those.

        Raises:
            ModelError: transformers can't use these tensors.
            CheckpointError: they don't fit the config.
        """

    def transforms(self, model: PreTrainedModel) -> list[Any] | None:  # noqa: ARG002
        """Transformers' weight transforms for :meth:`tensors`. The default is the class's own."""
        return None

    def check_unplaced(self, model: PreTrainedModel, names: Sequence[str]) -> None:  # noqa: B027
        """Refuse tensors that ``model`` has no place for, or warn; the default allows any.

        Raises ModelError: the model would be another one without a tensor.
        """

    @abstractmethod
    def packed(self, source: Weights, sites: Iterable[LinearSite]) -> PackedTensors:
        """The weights that the file holds packed.

        Args:
            source: the parameters of the model, whose store is the result of :meth:`tensors`.
            sites: the parameters that may be packed.
        """
