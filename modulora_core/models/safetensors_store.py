"""Read a folder of safetensors: all headers at once, tensors one at a time.

The format (https://github.com/huggingface/safetensors#format) begins with 8 bytes: the length of
the header, little endian. The header is JSON, ``{name: {"dtype", "shape", "data_offsets": [begin,
end]}}``. The data follows, to the end of the file.

``safetensors.safe_open`` maps the file, and every touched page counts as memory of this process
until the file is closed. Streaming a shard would peak at its size, so we use plain file reads.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Annotated

import torch
from pydantic import BaseModel, Field
from safetensors import SafetensorError, safe_open
from torch import Tensor

from modulora_core.errors import CheckpointError
from modulora_core.models.folders import ADAPTER_CONFIG, HOLDS_AN_ADAPTER, INDEX
from modulora_core.models.installed_formats import file_suffixes
from modulora_core.models.json_files import read_json
from modulora_core.models.store import StoredTensor

SINGLE = "model.safetensors"

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


class _Index(BaseModel):
    """``model.safetensors.index.json``."""

    # files of this folder
    weight_map: Annotated[
        dict[str, Annotated[str, Field(pattern=r"^[^/\\]+\.safetensors$")]], Field(min_length=1)
    ]


class SafetensorsStore:
    """Tensors of ``model.safetensors`` or of the shards in ``model.safetensors.index.json``."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        tensors: dict[str, StoredTensor] = {}
        self._offsets: dict[str, int] = {}
        index, files = _index(folder), shards_of(folder)
        missing = [file for file in files if not (folder / file).is_file()][:20]
        if missing:
            raise CheckpointError(_no_weights(folder) if not index else (
                f"{folder}: expected the {len(files)} shards of {INDEX}, got none named "
                f"{', '.join(missing)}; download the model again"
            ))  # fmt: skip
        for file in files:
            for name, (tensor, offset) in read_header(folder / file).items():
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
    """The weight files of a folder, by its index if it has one. Raises CheckpointError."""
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


def read_header(path: Path) -> dict[str, tuple[StoredTensor, int]]:
    """The tensors of one file and the bytes at which they begin, in the header's order.

    Raises CheckpointError: the header is broken, or doesn't fit the file's length.
    """
    try:
        with safe_open(path, "pt"):  # it checks names, dtypes, shapes, places and the file's length
            pass
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
    except SafetensorError as error:
        raise CheckpointError(
            f"{path}: truncated or damaged: expected a whole safetensors file, got "
            f"{path.stat().st_size} bytes ({error}); download it again"
        ) from None
    except OSError as error:
        raise CheckpointError(
            f"{path}: expected a readable file, got: {error.strerror or error}"
        ) from None
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
