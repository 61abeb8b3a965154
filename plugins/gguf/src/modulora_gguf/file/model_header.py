"""Read the header of a model in GGUF files, and refuse files that hold no model.

llama.cpp splits a large model into files ``NAME-00001-of-00003.gguf``, ... Each has a header of its
own tensors, and the first one has the metadata.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import numpy as np

from modulora_core.errors import CheckpointError, ModelError
from modulora_gguf.file.header import Header, read_part
from modulora_gguf.file.types import FLOATS

_MAX_PARTS = 99_999
_PART = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf", re.IGNORECASE)


def read_model_header(path: Path) -> Header:
    """As :func:`read_header`, of a model whose tensors can be read.

    Raises:
        CheckpointError: as :func:`read_header`, or the metadata names no architecture.
        ModelError: as :func:`read_header`, or the file holds an adapter or a vocabulary.
    """
    header = read_header(path)
    try:
        header.text("general.architecture")
        content = header.text("general.type", "model")
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}; download it again") from None
    if content != "model" or not header.tensors:
        got = f"type {content}" if header.tensors else "no tensors"
        raise ModelError(f"{path}: expected a model in this GGUF file, got {got}; give its model's")
    _refuse_unreadable(header)
    return header


def _refuse_unreadable(header: Header) -> None:
    """Refuse tensors of a type that the gguf package can't dequantize, such as whole numbers."""
    from gguf import dequantize
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

    names = {tensor.type: tensor.name for tensor in header.tensors}
    for type in names.keys() - FLOATS.keys():
        number = GGMLQuantizationType[type]
        try:
            dequantize(np.zeros((1, GGML_QUANT_SIZES[number][1]), np.uint8), number)
        except NotImplementedError:
            raise ModelError(
                f"{header.path}: {names[type]}: expected floats or blocks of weights, got type "
                f"{type}, which the installed gguf package can't dequantize; take the file in "
                "another type"
            ) from None


def read_header(path: Path) -> Header:
    """Parse the header of ``path``, and of the other parts of a split model, which lie beside it.

    Raises:
        CheckpointError: it isn't a GGUF file, or it is truncated or damaged, or a part is missing.
        ModelError: a tensor has a type that the installed gguf package doesn't know.
    """
    first = read_part(path)
    number, count = _number_and_count(first)
    if count in (0, 1):
        return first
    name = _PART.fullmatch(path.name)
    if name is None or number != 0 or (int(name[2]), int(name[3])) != (1, count):
        raise CheckpointError(
            f"{path}: expected the first of {count} parts, NAME-00001-of-{count:05d}.gguf, got "
            f"part {number + 1} in a file of this name"
        )
    tensors = list(first.tensors)
    for i in range(1, count):
        other = path.with_name(f"{name[1]}-{i + 1:05d}-of-{count:05d}.gguf")
        if not other.is_file():
            raise CheckpointError(
                f"{path}: expected all its {count} parts in this folder, got no {other.name}; "
                "download it too"
            )
        part = read_part(other)
        if _number_and_count(part) != (i, count):
            raise CheckpointError(f"{other}: expected part {i + 1} of {count}, got another one")
        tensors += part.tensors
    if len({tensor.name for tensor in tensors}) < len(tensors):
        raise CheckpointError(f"{path}: two of its parts have a tensor of one name")
    return replace(first, tensors=tuple(tensors))


def _number_and_count(header: Header) -> tuple[int, int]:
    """The number of this part, from 0, and of all; ``(0, 0)`` for a model in one file."""
    fields = (header.fields.get(name) for name in ("split.no", "split.count"))
    number, count = (0 if field is None else field.value for field in fields)
    if type(number) is not int or type(count) is not int or not 0 <= count <= _MAX_PARTS:
        raise CheckpointError(
            f"{header.path}: split.count: expected a number of files, got {count!r:.40}"
        )
    return number, count
