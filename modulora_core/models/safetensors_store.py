"""Read a folder of safetensors: all headers at once, tensors one at a time.

The format (https://github.com/huggingface/safetensors#format) begins with 8 bytes: the length of
the header, little endian. The header is JSON, ``{name: {"dtype", "shape", "data_offsets": [begin,
end]}}``. The data follows, to the end of the file.

``safetensors.safe_open`` maps the file, and every touched page counts as memory of this process
until the file is closed. Streaming a shard would peak at its size, so we use plain file reads.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any

import torch
from pydantic import AfterValidator, BaseModel, Field
from safetensors import SafetensorError, safe_open
from torch import Tensor

from modulora_core.errors import CheckpointError
from modulora_core.models.folders import ADAPTER_CONFIG, HOLDS_AN_ADAPTER, INDEX
from modulora_core.models.installed_formats import file_suffixes
from modulora_core.models.json_files import MOST_BYTES, check_json, read_json, without_collections
from modulora_core.models.store import StoredTensor

SINGLE = "model.safetensors"
MOST_TENSORS = 100_000
"""The most tensors of one file. A published file has at most 30,000, a model 210,000."""

MOST_IN_ALL = 400_000
"""The most tensors of a model; each takes some microseconds before one is read."""

_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
DTYPE_CODES = {
    "bool": "BOOL", "uint8": "U8", "int8": "I8", "int16": "I16", "uint16": "U16", "float16": "F16",
    "bfloat16": "BF16", "int32": "I32", "uint32": "U32", "float32": "F32", "int64": "I64",
    "uint64": "U64", "float64": "F64", "float8_e4m3fn": "F8_E4M3", "float8_e8m0fnu": "F8_E8M0",
}  # fmt: skip
"""torch's dtype names and the codes of safetensors, for the dtypes that we write."""

_DTYPES = {code: dtype for dtype, code in DTYPE_CODES.items()} | {
    "F8_E5M2": "float8_e5m2", "C64": "complex64",
}  # fmt: skip


def _in_the_folder(file: str) -> str:
    if Path(file).name != file or not file.endswith(".safetensors"):
        raise ValueError("expected a .safetensors file of this folder")
    return file


class _Index(BaseModel):
    """``model.safetensors.index.json``."""

    weight_map: Annotated[
        dict[str, Annotated[str, AfterValidator(_in_the_folder)]], Field(min_length=1)
    ]


_SHOWN = 20
"""The most missing files in a message."""


class SafetensorsStore:
    """The tensors of ``model.safetensors``, or of the shards in ``model.safetensors.index.json``.

    Raises:
        CheckpointError: no weights, a shard that is missing or truncated, a broken header or index.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        tensors: dict[str, StoredTensor] = {}
        self._offsets: dict[str, int] = {}
        index, files = _index(folder), shards_of(folder)
        missing = [*islice((file for file in files if not (folder / file).is_file()), _SHOWN)]
        if missing:
            raise CheckpointError(_no_weights(folder) if not index else (
                f"{folder}: expected the {len(files)} shards of {INDEX}, got none named "
                f"{', '.join(missing)}; download the model again"
            ))  # fmt: skip
        seen = 0
        for file in files:
            header = read_header(folder / file)
            seen += len(header)
            if seen > MOST_IN_ALL:
                raise CheckpointError(
                    f"{folder}: expected at most {MOST_IN_ALL:,} tensors, got more"
                )
            for name, (tensor, offset) in header.items():
                if index.get(name, file) == file:
                    tensors[name], self._offsets[name] = tensor, offset
        absent = sorted(set(index) - set(tensors))
        if absent:
            raise CheckpointError(
                f"{folder / INDEX}: {len(absent)} tensors of the index aren't in their shards, "
                f"such as {absent[0]}, expected in {index[absent[0]]}; download the model again"
            )
        self.tensors: Mapping[str, StoredTensor] = MappingProxyType(tensors)

    def read(self, name: str) -> Tensor:
        return self._read(name, self.tensors[name].shape, 0)

    def read_part(self, name: str, index: int) -> Tensor:
        """Read ``tensor[index]``."""
        return self._read(name, self.tensors[name].shape[1:], index)

    def _read(self, name: str, shape: tuple[int, ...], index: int) -> Tensor:
        """Read part ``index`` of a tensor that is cut into parts of this shape."""
        tensor = self.tensors[name]
        path = self._folder / tensor.file
        nbytes = math.prod(shape) * tensor.dtype.itemsize
        buffer = torch.empty(nbytes, dtype=torch.uint8)
        with path.open("rb") as file:
            file.seek(self._offsets[name] + index * nbytes)
            got = file.readinto(buffer.numpy().data)
        if got != nbytes:
            raise CheckpointError(
                f"{path}: expected {nbytes} bytes of {name}, got {got}; the file was changed"
            )
        return buffer.view(tensor.dtype).view(shape)

    def offset(self, name: str) -> int:
        """The offset of a tensor's first byte in its file."""
        return self._offsets[name]


def shards_of(folder: Path) -> list[str]:
    """The weight files of a folder, by its index if it has one.

    Raises:
        CheckpointError: the index is broken, or names files outside of the folder.
    """
    return sorted(set(_index(folder).values())) or [SINGLE]


def _index(folder: Path) -> dict[str, str]:
    """``{tensor: file}``; empty if there is one file."""
    path = folder / INDEX
    if (folder / SINGLE).is_file() or not path.is_file():
        return {}
    return read_json(path, _Index).weight_map


def _no_weights(folder: Path) -> str:
    names = sorted(file.name for file in folder.iterdir() if file.is_file())
    expected = f"{folder}: no weights; expected {SINGLE} or {INDEX}"
    pickles = [name for name in names if Path(name).suffix in _PICKLES]
    if pickles:
        return (
            f"{expected}, got {', '.join(pickles)}. These are pickles: reading one can run code, "
            "so they aren't read. If you trust them, convert them once with transformers: "
            "AutoModelForCausalLM.from_pretrained(folder).save_pretrained(another_folder)"
        )
    if ADAPTER_CONFIG in names:
        return f"{expected}; {HOLDS_AN_ADAPTER}"
    others = [name for name in names if name.endswith((".safetensors", *file_suffixes()))]
    return f"{expected}, got {', '.join(others) or 'no weight files'}"


@without_collections()
def read_header(path: Path) -> dict[str, tuple[StoredTensor, int]]:
    """The tensors of one file and the bytes at which they begin, in the header's order.

    Raises:
        CheckpointError: the header is broken, or doesn't fit the file's length.
    """
    text = _header_text(path)
    try:
        with safe_open(path, "pt"):  # it checks names, dtypes, shapes, places and the file's length
            pass
    except SafetensorError as error:
        raise CheckpointError(
            f"{path}: truncated or damaged: expected a whole safetensors file, got "
            f"{path.stat().st_size} bytes ({error}); download it again"
        ) from None
    header, length = check_json(text, dict[str, Any], f"header of {path}"), len(text)
    header.pop("__metadata__", None)
    found = {}
    for name, entry in header.items():
        dtype = getattr(torch, str(_DTYPES.get(entry["dtype"])), None)
        if dtype is None:
            known, got = ", ".join(_DTYPES), entry["dtype"]
            raise CheckpointError(f"{path}: dtype of {name}: expected one of {known}, got {got!r}")
        begin, end = entry["data_offsets"]
        stored = StoredTensor(tuple(entry["shape"]), dtype, entry["dtype"], end - begin, path.name)
        found[name] = stored, 8 + length + begin
    return found


def _header_text(path: Path) -> bytes:
    """The header of a file, before anything parses it. Raises CheckpointError: it is huge."""
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > MOST_BYTES < path.stat().st_size:
                raise CheckpointError(
                    f"header of {path}: expected at most {MOST_BYTES:,} bytes, got {length:,}"
                )
            text = file.read(min(length, MOST_BYTES))
    except OSError as error:
        raise CheckpointError(
            f"{path}: expected a readable file, got: {error.strerror or error}"
        ) from None
    tensors = text.count(b'"data_offsets"')
    if tensors > MOST_TENSORS:
        raise CheckpointError(
            f"header of {path}: expected at most {MOST_TENSORS:,} tensors, got {tensors:,}; split "
            "the file"
        )
    return text
