"""A GGUF file: the header is read at once, tensors are dequantized one at a time.

transformers reads a GGUF file in one of two ways, and so does this module, with transformers' tables: most
architectures through a map from the file's names to the names in memory and a *tensor processor* for each
architecture (``modeling_gguf_pytorch_utils``), a few newer ones through weight transforms
(``integrations.gguf``). transformers dequantizes the whole file into one dictionary; here it is a tensor at
a time. Like ``conversion.py``, this file holds every use of those semi-private parts.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from modulora_core.errors import CheckpointError, MissingExtraError, ModelError
from modulora_core.models.store import CHUNK_BYTES, StoredTensor

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

_FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True, slots=True)
class GGUFTensor:
    """One tensor of the file: its ``shape`` in torch's order, and how numpy sees its bytes."""

    name: str
    kind: Any  # gguf.GGMLQuantizationType
    shape: tuple[int, ...]
    raw_shape: tuple[int, ...]
    raw_dtype: np.dtype[Any]
    offset: int

    @property
    def nbytes(self) -> int:
        return math.prod(self.raw_shape) * self.raw_dtype.itemsize


@dataclass(frozen=True, slots=True)
class GGUFFile:
    """What the header of a GGUF file says."""

    path: Path
    architecture: str
    tensors: Mapping[str, GGUFTensor]

    @property
    def dtype(self) -> torch.dtype:
        """What transformers loads it in: fp32, or the file's type where a newer reader meets only floats."""
        kinds = {tensor.kind.name for tensor in self.tensors.values()}
        if _transforms_of(self.architecture) is None or not kinds <= set(_FLOATS):
            return torch.float32
        return next((_FLOATS[kind] for kind in ("BF16", "F16") if kind in kinds), torch.float32)

    def raw(
        self, tensor: GGUFTensor, start: int = 0, stop: int | None = None
    ) -> np.ndarray[Any, Any]:
        """The stored bytes of rows ``[start, stop)`` along the first axis."""
        rows = (tensor.raw_shape[0] if stop is None else stop) - start
        row = math.prod(tensor.raw_shape[1:])
        offset = tensor.offset + start * row * tensor.raw_dtype.itemsize
        raw = np.fromfile(self.path, dtype=tensor.raw_dtype, count=rows * row, offset=offset)
        if raw.size != rows * row:
            raise CheckpointError(
                f"{self.path}: expected {rows * row} values of {tensor.name}, got {raw.size}"
            )
        return raw.reshape(rows, *tensor.raw_shape[1:])


def read_gguf(path: Path) -> GGUFFile:
    """Read the header of a GGUF file.

    Raises:
        MissingExtraError: the ``gguf`` package isn't installed.
        CheckpointError: it isn't a GGUF file, or it is truncated.
    """
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise MissingExtraError(
            f"{path}: reading GGUF needs the package 'gguf'; install it: pip install 'modulora-core[gguf]'"
        ) from error
    try:
        reader = GGUFReader(path)
        field = reader.fields["general.architecture"]
        architecture = bytes(field.parts[field.data[0]]).decode("utf-8")
        tensors = {
            t.name: GGUFTensor(t.name, t.tensor_type, tuple(int(n) for n in reversed(t.shape)),
                               tuple(t.data.shape), t.data.dtype, int(t.data_offset))
            for t in reader.tensors
        }  # fmt: skip
    except (
        Exception
    ) as error:  # the reader indexes into the bytes, so a broken file raises anything
        raise CheckpointError(
            f"{path}: not a GGUF file, or truncated ({error}); download it again"
        ) from error
    return GGUFFile(path, architecture, tensors)


def gguf_config(file: GGUFFile) -> tuple[PretrainedConfig, dict[str, Any]]:
    """The config that transformers makes of the header, and the dictionary that it makes it of.

    Raises:
        ModelError: transformers doesn't know the architecture.
    """
    from transformers import AutoConfig, PretrainedConfig

    try:
        values, _ = PretrainedConfig.get_config_dict(file.path.parent, gguf_file=file.path.name)
        return AutoConfig.for_model(**values), values
    except (
        Exception
    ) as error:  # KeyError of a missing field, ValueError of an unknown architecture, ...
        raise ModelError(
            f"{file.path}: transformers can't read the GGUF architecture {file.architecture!r} ({error}); "
            f"give the safetensors of this model"
        ) from error


class GGUFStore:
    """The tensors of a GGUF file, dequantized, under the names in memory of ``model``.

    Attributes:
        transforms: transformers' weight transforms where the architecture is read through them; then the
            names are the file's own. None where they are the names in memory.
    """

    def __init__(self, file: GGUFFile, model: PreTrainedModel, values: dict[str, Any]) -> None:
        self._file = file
        self._map: dict[str, str] = {}
        self._processor: Any = None
        build = _transforms_of(file.architecture)
        self.transforms = None if build is None else build(file.architecture, model.config)
        if self.transforms is None:
            self._processor, self._map = _names_in_memory(file, model, values)
        self._parts: dict[str, list[GGUFTensor]] = {}
        for tensor in file.tensors.values():
            self._parts.setdefault(self._name_of(tensor.name), []).append(tensor)
        shapes = (
            {}
            if self._processor is None
            else {n: tuple(t.shape) for n, t in model.state_dict().items()}
        )
        self._tensors = {
            name: self._stored(name, parts, shapes) for name, parts in self._parts.items()
        }

    @property
    def tensors(self) -> Mapping[str, StoredTensor]:
        return MappingProxyType(self._tensors)

    def read(self, name: str) -> Tensor:
        if self._processor is None:
            (part,) = self._parts[name]
            return self._values(part, self._file.raw(part))
        # processors that fuse several tensors put the result here themselves
        collected: dict[str, dict[str, Tensor]] = {"tensors": {}}
        for part in self._parts[name]:
            result = self._processor.process(
                weights=self._values(part, self._file.raw(part)).numpy(), name=part.name,
                tensor_key_mapping=self._map, parsed_parameters=collected,
            )  # fmt: skip
            if result.name is not None:
                return torch.from_numpy(np.ascontiguousarray(result.weights))
        return collected["tensors"][name]

    def chunks(self, name: str) -> Iterator[Tensor]:
        for part in self._parts[name]:
            rows = part.raw_shape[0]
            step = max(1, CHUNK_BYTES * rows // max(1, 4 * math.prod(part.shape)))  # of fp32 values
            for start in range(0, rows, step):
                yield self._values(part, self._file.raw(part, start, min(start + step, rows)))

    def _name_of(self, name: str) -> str:
        """The name in memory (a stack of experts has no suffix there), else the file's own."""
        return self._map.get(name) or self._map.get(name.removesuffix(".weight")) or name

    def _stored(
        self, name: str, parts: list[GGUFTensor], shapes: Mapping[str, tuple[int, ...]]
    ) -> StoredTensor:
        shape, numel = parts[0].shape, sum(math.prod(part.shape) for part in parts)
        if name in shapes:
            if numel != math.prod(shapes[name]):
                raise CheckpointError(
                    f"{self._file.path}: {name}: expected {math.prod(shapes[name])} values for shape "
                    f"{list(shapes[name])}, got {numel} in {', '.join(part.name for part in parts)}"
                )
            shape = shapes[name]  # a processor may transpose or fuse, so the header doesn't tell
        as_is = self._processor is None and parts[0].kind.name in _FLOATS
        dtype = _FLOATS[parts[0].kind.name] if as_is else torch.float32
        nbytes = sum(part.nbytes for part in parts)
        return StoredTensor(shape, dtype, parts[0].kind.name, nbytes, self._file.path.name)

    def _values(self, part: GGUFTensor, raw: np.ndarray[Any, Any]) -> Tensor:
        if self._processor is None and part.kind.name in _FLOATS:
            return torch.from_numpy(raw).view(_FLOATS[part.kind.name]).reshape(-1, *part.shape[1:])
        from gguf import dequantize

        return torch.from_numpy(dequantize(raw, part.kind))


def _names_in_memory(
    file: GGUFFile, model: PreTrainedModel, values: dict[str, Any]
) -> tuple[Any, dict[str, str]]:
    from transformers.modeling_gguf_pytorch_utils import (
        TENSOR_PROCESSORS,
        TensorProcessor,
        get_gguf_hf_weights_map,
    )

    processor = TENSOR_PROCESSORS.get(file.architecture, TensorProcessor)(config=values)
    try:
        return processor, get_gguf_hf_weights_map(_Outline(model), processor)
    except NotImplementedError as error:
        raise ModelError(f"{file.path}: {error}; give the safetensors of this model") from error


class _Outline:
    """What transformers' map of names looks at of a model: its names and those of its direct children.

    It descends into every module otherwise and builds the table of all names for each: 6 s for 30 layers.
    Files are written from a model or from its base model, so their names are not further down.
    """

    def __init__(self, model: Any, *, children: bool = True) -> None:
        self.config = getattr(model, "config", None)
        self.state_dict = model.state_dict
        self._children = (
            [(name, _Outline(m, children=False)) for name, m in model.named_children()]
            if children
            else []
        )

    def named_children(self) -> list[tuple[str, _Outline]]:
        return self._children


def _transforms_of(architecture: str) -> Any:
    """The function of transformers that builds weight transforms, None where it reads in the other way."""
    try:
        from transformers.integrations.gguf import (
            get_gguf_conversion_mapping,
            is_gguf_arch_supported,
        )
    except (
        ImportError
    ):  # older versions, such as 5.0, read every architecture through names and processors
        return None
    return get_gguf_conversion_mapping if is_gguf_arch_supported(architecture) else None
