"""Read a GGUF file: the header at once, tensors dequantized one at a time.

transformers reads a GGUF file in one of two ways, and this module uses its tables for both. For
most architectures a map gives the names in memory, and a *tensor processor* changes the values
(``modeling_gguf_pytorch_utils``). A few newer ones have weight transforms (``integrations.gguf``).

transformers dequantizes the whole file into one dictionary; we dequantize a tensor at a time. Its
tables are semi-private, so every use is in this file.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from modulora_core.errors import CheckpointError, ModelError
from modulora_core.models.store import StoredTensor
from modulora_gguf.file.header import Header, TensorInfo, read_header

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
MIXTRAL = "mixtral"
"""The type of models of llama files with experts."""

_NUMPY: dict[str, Any] = {"F32": np.float32, "F16": np.float16}


class GGUFTensor:
    """One tensor of the file: its kind (``"Q4_1"``) and its shape in torch's order.

    Args:
        scale: the factor of the weight, if the file has one; of a stack one for each matrix.
    """

    def __init__(self, info: TensorInfo, scale: GGUFTensor | None = None) -> None:
        from gguf import quant_shape_to_byte_shape
        from gguf.constants import GGMLQuantizationType

        self.name, self.kind, self.shape = info.name, info.kind, info.shape
        self.offset, self.nbytes, self.path = info.offset, info.nbytes, info.path
        self.numel, self._type = math.prod(info.shape), GGMLQuantizationType[info.kind]
        self._raw_dtype = _NUMPY.get(info.kind, np.uint8)
        self._raw_shape = info.shape
        if info.kind not in _NUMPY:
            self._raw_shape = quant_shape_to_byte_shape(info.shape, self._type)
        self.scale, matrices = scale, math.prod(info.shape[:-2])
        if scale is not None and (scale.numel, scale.kind) != (matrices, "F32"):
            raise CheckpointError(
                f"{scale.name}: expected {matrices} factors of {self.name} in F32, got "
                f"{scale.numel} in {scale.kind}"
            )

    def read(self, *, as_stored: bool) -> Tensor:
        """The tensor, dequantized to fp32; with ``as_stored`` floats keep their dtype."""
        raw = self._raw()
        if as_stored and self.kind in _FLOATS and self.scale is None:
            return torch.from_numpy(raw).view(_FLOATS[self.kind]).reshape(self.shape)
        from gguf import dequantize

        values = torch.from_numpy(dequantize(raw, self._type))
        if self.scale is None:
            return values
        factors = self.scale.read(as_stored=False)
        return values * (factors.view(-1, 1, 1) if values.dim() > 2 else factors)

    @property
    def is_float(self) -> bool:
        return self.kind in _FLOATS

    def blocks(self) -> Tensor:
        """The bytes of all rows: uint8 ``[rows, row bytes]``.

        They are mapped from the file, which must not change while they live; writes stay private.
        """
        if self.offset + self.nbytes > self.path.stat().st_size:
            raise CheckpointError(f"{self.path}: {self.name} is truncated; download it again")
        mapped = np.memmap(self.path, np.uint8, "c", self.offset, (self.nbytes,))
        return torch.from_numpy(mapped).view(self.numel // self.shape[-1], -1)

    def row_numbers(self, first: int) -> Tensor:
        """The number of each row, from ``first`` on, fp32: as a tensor whose rows have one value.

        The values of a vector are its rows.
        """
        rows = math.prod(self.shape[:-1] or self.shape)
        numbers = torch.arange(first, first + rows, dtype=torch.float32)
        return numbers.view(*self.shape[:-1], 1) if len(self.shape) > 1 else numbers

    def _raw(self) -> Any:
        count = math.prod(self._raw_shape)
        raw = np.fromfile(self.path, dtype=self._raw_dtype, count=count, offset=self.offset)
        if raw.size != count:
            raise CheckpointError(
                f"{self.path}: expected {count} values of {self.name}, got {raw.size}; "
                "the file was changed"
            )
        return raw.reshape(self._raw_shape)


@dataclass(frozen=True, slots=True)
class GGUFFile:
    """The header of a GGUF file, and its tensors by name."""

    path: Path
    architecture: str
    tensors: Mapping[str, GGUFTensor]
    header: Header

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that transformers loads it in: mostly fp32; a newer reader keeps floats."""
        kinds = {tensor.kind for tensor in self.tensors.values()}
        if _transforms_of(self.architecture) is None or not kinds <= set(_FLOATS):
            return torch.float32
        return next((_FLOATS[kind] for kind in ("BF16", "F16") if kind in kinds), torch.float32)


def read_gguf(path: Path) -> GGUFFile:
    """Read the header of a GGUF file.

    Raises:
        CheckpointError: it isn't a GGUF file, or it is truncated.
        ModelError: it holds an adapter or a vocabulary.
    """
    header = read_header(path)
    try:
        architecture = header.text("general.architecture")
        content = header.text("general.type", "model")
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}; download it again") from None
    if content != "model" or not header.tensors:
        got = f"type {content}" if header.tensors else "no tensors"
        raise ModelError(f"{path}: expected a model in this GGUF file, got {got}; give its model's")
    _refuse_unreadable(path, header)
    return GGUFFile(path, architecture, _tensors(header), header)


def _tensors(header: Header) -> dict[str, GGUFTensor]:
    """The tensors by name; a weight knows its factor."""
    infos = {info.name: info for info in header.tensors}
    found: dict[str, GGUFTensor] = {}
    for name, info in infos.items():
        scale = infos.get(scale_of(name))
        found[name] = GGUFTensor(info, None if scale is None else GGUFTensor(scale))
    return found


def scale_of(name: str) -> str:
    """The name of the factor of a weight in a file: ``blk.0.attn_q.scale``; "" for other names."""
    stem = name.removesuffix(".weight")
    return "" if stem == name else f"{stem}.scale"


def _refuse_unreadable(path: Path, header: Header) -> None:
    """Refuse tensors of a type that the gguf package can't dequantize, such as whole numbers."""
    from gguf import dequantize
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

    names = {tensor.kind: tensor.name for tensor in header.tensors}
    for kind in names.keys() - _FLOATS.keys():
        number = GGMLQuantizationType[kind]
        try:
            dequantize(np.zeros((1, GGML_QUANT_SIZES[number][1]), np.uint8), number)
        except NotImplementedError:
            raise ModelError(
                f"{path}: {names[kind]}: expected floats or blocks of weights, got type {kind}, "
                "which the installed gguf package can't dequantize; take the file in another type"
            ) from None


class GGUFStore:
    """The tensors of a GGUF file, dequantized, under the names in memory of ``model``.

    Attributes:
        file: as given.
        transforms: transformers' weight transforms, if it reads the architecture through them. The
            names are then the file's own. None: the names are those in memory.
    """

    def __init__(self, file: GGUFFile, model: PreTrainedModel, values: dict[str, Any]) -> None:
        self.file = file
        self._map: dict[str, str] = {}
        self._processor: Any = None
        shapes: dict[str, tuple[int, ...]] = {}
        build = _transforms_of(file.architecture)
        self.transforms = None if build is None else build(file.architecture, model.config)
        if self.transforms is None:
            self._processor, self._map = _names_in_memory(file, model, values)
            shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        self._parts: dict[str, list[GGUFTensor]] = {}
        factors = {tensor.scale.name for tensor in file.tensors.values() if tensor.scale}
        for tensor in file.tensors.values():
            if tensor.name in factors:
                continue
            self._parts.setdefault(self._name_of(tensor.name), []).append(tensor)
        self.tensors: Mapping[str, StoredTensor] = MappingProxyType(
            {name: self._stored(name, parts, shapes) for name, parts in self._parts.items()}
        )

    def read(self, name: str) -> Tensor:
        read = self._processed(name, partial(GGUFTensor.read, as_stored=self._processor is None))
        return read.reshape(self.tensors[name].shape)  # files have or lack dimensions of size 1

    def row_numbers(self, name: str, firsts: Mapping[str, int]) -> Tensor:
        """The number of each row in memory; ``firsts`` has the first of each tensor of the file."""

        def numbers(part: GGUFTensor) -> Tensor:
            return part.row_numbers(firsts[part.name])

        try:
            return self._processed(name, numbers)
        except ValueError:  # Bloom's processor reshapes rows by their length
            return self._processed(name, lambda part: numbers(part).expand(part.shape))[..., :1]

    def names_in_file(self, name: str) -> list[str]:
        """The names in the file of the parts of a tensor."""
        return [part.name for part in self._parts[name]]

    def in_file(self, name: str) -> GGUFTensor:
        """A tensor of the file, by its name there."""
        return self.file.tensors[name]

    def _processed(self, name: str, contents: Callable[[GGUFTensor], Tensor]) -> Tensor:
        if self._processor is None:
            (part,) = self._parts[name]
            return contents(part)
        # processors that fuse several tensors put the result here themselves
        collected: dict[str, dict[str, Tensor]] = {"tensors": {}}
        for part in self._parts[name]:
            result = self._processor.process(
                weights=contents(part).numpy(), name=part.name,
                tensor_key_mapping=self._map, parsed_parameters=collected,
            )  # fmt: skip
            if result.name is not None:
                return torch.from_numpy(np.ascontiguousarray(result.weights))
        return collected["tensors"][name]

    def _name_of(self, name: str) -> str:
        """The name in memory (a stack of experts has no suffix there), else the file's own."""
        return self._map.get(name) or self._map.get(name.removesuffix(".weight")) or name

    def _stored(
        self, name: str, parts: list[GGUFTensor], shapes: Mapping[str, tuple[int, ...]]
    ) -> StoredTensor:
        # a processor may transpose or fuse, so that only the model knows the shape
        shape, found = shapes.get(name, parts[0].shape), sum(part.numel for part in parts)
        if found != math.prod(shape):
            raise CheckpointError(
                f"{self.file.path}: {name}: expected {math.prod(shape)} values for shape "
                f"{list(shape)}, got {found} in {', '.join(part.name for part in parts)}"
            )
        kind, file = parts[0].kind, parts[0].path.name
        dtype = torch.float32 if self._processor is not None else _FLOATS.get(kind, torch.float32)
        return StoredTensor(shape, dtype, kind, sum(part.nbytes for part in parts), file)


def _names_in_memory(
    file: GGUFFile, model: PreTrainedModel, values: dict[str, Any]
) -> tuple[Any, dict[str, str]]:
    """Transformers' tensor processor of the architecture, and its map from names in the file."""
    from transformers.modeling_gguf_pytorch_utils import (
        TENSOR_PROCESSORS,
        TensorProcessor,
        get_gguf_hf_weights_map,
    )

    from modulora_gguf.file.processors import PROCESSORS

    kinds, kind = TENSOR_PROCESSORS | PROCESSORS, file.architecture
    is_mixtral = model.config.model_type == MIXTRAL  # the gguf package has its names in llama's
    processor = kinds.get(MIXTRAL if is_mixtral else kind, TensorProcessor)(config=values)
    try:
        model_type = kind if is_mixtral else None
        return processor, get_gguf_hf_weights_map(_Outline(model), processor, model_type)
    except NotImplementedError as error:
        raise ModelError(f"{file.path}: {error}; give the safetensors of this model") from error


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


def _transforms_of(architecture: str) -> Any:
    """Transformers' function that builds weight transforms; None if it reads in the other way."""
    from transformers.integrations.gguf import get_gguf_conversion_mapping, is_gguf_arch_supported

    return get_gguf_conversion_mapping if is_gguf_arch_supported(architecture) else None
