"""Give the tensors of a GGUF file the names and the values of the model in memory.

transformers reads a GGUF file in one of two ways, and this module uses its tables for both. For
most architectures a map gives the names in memory, and a *tensor processor* changes the values
(``modeling_gguf_pytorch_utils``). A few newer ones have weight transforms (``integrations.gguf``).

transformers dequantizes the whole file into one dictionary; we dequantize a tensor at a time. Its
tables are semi-private. Other uses of them are in ``config.py``, ``processors.py`` and
``splits.py``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from modulora_core.errors import CheckpointError, ModelError
from modulora_core.models.store import StoredTensor
from modulora_gguf.file.header import Header
from modulora_gguf.file.tensors import FileTensor, tensors_of
from modulora_gguf.file.types import FLOATS

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

MIXTRAL = "mixtral"
"""The type of models of llama files with experts."""


class GGUFStore:
    """The tensors of a GGUF file, dequantized, under the names in memory of ``model``.

    The names are the file's own if transformers reads the architecture through
    :func:`weight_transforms`.

    Args:
        header: of the file.
        model: on the meta device.
        values: the fields of its config, for transformers' tensor processor.

    Raises:
        ModelError: transformers has no names for this architecture.
        CheckpointError: a tensor doesn't fit the model.
    """

    def __init__(self, header: Header, model: PreTrainedModel, values: dict[str, Any]) -> None:
        self.header = header
        self._in_file = tensors_of(header)
        self._map: dict[str, str] = {}
        self._processor: Any = None
        shapes: dict[str, tuple[int, ...]] = {}
        if not _has_transforms(header.architecture):
            self._processor, self._map = _names_in_memory(header, model, values)
            shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        self._parts: dict[str, list[FileTensor]] = {}
        factors = {tensor.scale.info.name for tensor in self._in_file.values() if tensor.scale}
        for name, tensor in self._in_file.items():
            if name not in factors:
                self._parts.setdefault(self._name_of(name), []).append(tensor)
        self.tensors: Mapping[str, StoredTensor] = MappingProxyType(
            {name: self._stored(name, parts, shapes) for name, parts in self._parts.items()}
        )

    def read(self, name: str) -> Tensor:
        read = self._processed(name, partial(FileTensor.read, as_stored=self._processor is None))
        return read.reshape(self.tensors[name].shape)  # files have or lack dimensions of size 1

    def row_numbers(self, name: str, firsts: Mapping[str, int]) -> Tensor:
        """The number of each row in memory; ``firsts`` has the first of each tensor of the file."""

        def numbers(part: FileTensor) -> Tensor:
            return part.row_numbers(firsts[part.info.name])

        try:
            return self._processed(name, numbers)
        except ValueError:  # Bloom's processor reshapes rows by their length
            return self._processed(name, lambda part: numbers(part).expand(part.info.shape))[
                ..., :1
            ]

    def names_in_file(self, name: str) -> list[str]:
        """The names in the file of the parts of a tensor."""
        return [part.info.name for part in self._parts[name]]

    def in_file(self, name: str) -> FileTensor:
        """A tensor of the file, by its name there."""
        return self._in_file[name]

    def _processed(self, name: str, contents: Callable[[FileTensor], Tensor]) -> Tensor:
        if self._processor is None:
            (part,) = self._parts[name]
            return contents(part)
        # processors that fuse several tensors put the result here themselves
        collected: dict[str, dict[str, Tensor]] = {"tensors": {}}
        for part in self._parts[name]:
            result = self._processor.process(
                weights=contents(part).numpy(), name=part.info.name,
                tensor_key_mapping=self._map, parsed_parameters=collected,
            )  # fmt: skip
            if result.name is not None:
                return torch.from_numpy(np.ascontiguousarray(result.weights))
        return collected["tensors"][name]

    def _name_of(self, name: str) -> str:
        """The name in memory (a stack of experts has no suffix there), else the file's own."""
        return self._map.get(name) or self._map.get(name.removesuffix(".weight")) or name

    def _stored(
        self, name: str, parts: list[FileTensor], shapes: Mapping[str, tuple[int, ...]]
    ) -> StoredTensor:
        infos = [part.info for part in parts]
        first = infos[0]
        # a processor may transpose or fuse, so that only the model knows the shape
        shape, found = shapes.get(name, first.shape), sum(info.numel for info in infos)
        if found != math.prod(shape):
            raise CheckpointError(
                f"{self.header.path}: {name}: expected {math.prod(shape)} values for shape "
                f"{list(shape)}, got {found} in {', '.join(info.name for info in infos)}"
            )
        keeps_floats = self._processor is None
        dtype = FLOATS.get(first.type, torch.float32) if keeps_floats else torch.float32
        nbytes = sum(info.nbytes for info in infos)
        return StoredTensor(shape, dtype, first.type, nbytes, first.path.name)


def _names_in_memory(
    header: Header, model: PreTrainedModel, values: dict[str, Any]
) -> tuple[Any, dict[str, str]]:
    """Transformers' tensor processor of the architecture, and its map from names in the file."""
    from transformers.modeling_gguf_pytorch_utils import (
        TENSOR_PROCESSORS,
        TensorProcessor,
        get_gguf_hf_weights_map,
    )

    from modulora_gguf.file.processors import PROCESSORS

    is_mixtral = model.config.model_type == MIXTRAL  # the gguf package has its names in llama's
    found = TENSOR_PROCESSORS | PROCESSORS
    name = MIXTRAL if is_mixtral else header.architecture
    processor = found.get(name, TensorProcessor)(config=values)
    try:
        model_type = header.architecture if is_mixtral else None
        return processor, get_gguf_hf_weights_map(_Outline(model), processor, model_type)
    except NotImplementedError as error:
        raise ModelError(f"{header.path}: {error}; give the safetensors of this model") from error


class _Outline:
    """A model's names and its direct children's names, for transformers' map of names.

    The map descends into every module and builds the table of all names for each, which takes 6 s
    for 30 layers. Files have the names of a model or of its base model, so deeper ones aren't
    needed.
    """

    def __init__(self, model: Any, *, children: bool = True) -> None:
        self.config = getattr(model, "config", None)
        self.state_dict = model.state_dict
        below = model.named_children() if children else ()
        self._children = [(name, _Outline(module, children=False)) for name, module in below]

    def named_children(self) -> list[tuple[str, _Outline]]:
        return self._children


def weight_transforms(architecture: str, config: PretrainedConfig) -> list[Any] | None:
    """Transformers' weight transforms; None if it has tensor processors for the architecture."""
    from transformers.integrations.gguf import get_gguf_conversion_mapping

    if not _has_transforms(architecture):
        return None
    transforms: list[Any] = get_gguf_conversion_mapping(architecture, config)
    return transforms


def dtype_of(header: Header) -> torch.dtype:
    """The dtype that transformers loads a file in: mostly fp32; a newer reader keeps floats."""
    types = {info.type for info in header.tensors}
    if not _has_transforms(header.architecture) or not types <= FLOATS.keys():
        return torch.float32
    return next((FLOATS[type] for type in ("BF16", "F16") if type in types), torch.float32)


def _has_transforms(architecture: str) -> bool:
    """Whether transformers reads an architecture by weight transforms, its newer way."""
    from transformers.integrations.gguf import is_gguf_arch_supported

    return bool(is_gguf_arch_supported(architecture))
