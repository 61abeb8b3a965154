"""A folder of safetensors: headers are read and checked at once, tensors one at a time.

The format (https://github.com/huggingface/safetensors#format): 8 bytes, the length n of the header as a
little-endian unsigned integer; n bytes of JSON, ``{name: {"dtype", "shape", "data_offsets": [begin, end]}}``;
then the data, to the end of the file.

Tensors are read with plain file reads rather than through ``safetensors.safe_open``: every page of its memory
map that was touched counts as memory of this process until the file is closed, so that streaming a shard
peaks at the size of the shard. Who wants a map says so (:mod:`modulora_core.checkpoints.mapped_files`).
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from modulora_core.errors import CheckpointError
from modulora_core.models.store import CHUNK_BYTES, StoredTensor

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_LONGEST_HEADER = 100 * 2**20  # the limit of the safetensors library
DTYPE_CODES = {
    "bool": "BOOL", "uint8": "U8", "int8": "I8", "int16": "I16", "uint16": "U16", "float16": "F16", "bfloat16": "BF16",
    "int32": "I32", "uint32": "U32", "float32": "F32", "int64": "I64", "uint64": "U64", "float64": "F64",
}  # fmt: skip
"""torch's dtype names and the codes of safetensors."""

_DTYPES = {code: dtype for dtype, code in DTYPE_CODES.items()} | {
    "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "F8_E8M0": "float8_e8m0fnu", "C64": "complex64",
}  # fmt: skip
"""What is written (shards.py), and what others write."""


class SafetensorsStore:
    """The tensors of ``model.safetensors``, or of the shards that ``model.safetensors.index.json`` names.

    Raises:
        CheckpointError: no weights, a shard that is missing or truncated, a broken header or index.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        tensors: dict[str, StoredTensor] = {}
        offsets: dict[str, int] = {}
        files, index = _weight_files(folder)
        for file in files:
            for name, (tensor, offset) in read_header(folder / file).items():
                if index.get(name, file) == file:
                    tensors[name], offsets[name] = tensor, offset
        absent = sorted(set(index) - set(tensors))
        if absent:
            raise CheckpointError(
                f"{folder / INDEX}: {len(absent)} tensors of the index aren't in their shards, such as "
                f"{absent[0]}, expected in {index[absent[0]]}; download the model again"
            )
        self._tensors, self._offsets = tensors, offsets

    @property
    def tensors(self) -> Mapping[str, StoredTensor]:
        return MappingProxyType(self._tensors)

    def read(self, name: str) -> Tensor:
        tensor = self._tensors[name]
        buffer = torch.empty(tensor.nbytes, dtype=torch.uint8)
        self._read_into(name, 0, buffer)
        return buffer.view(tensor.dtype).view(tensor.shape)

    def offset(self, name: str) -> int:
        """Where a tensor begins in its file, in bytes."""
        return self._offsets[name]

    def chunks(self, name: str) -> Iterator[Tensor]:
        tensor = self._tensors[name]
        buffer = torch.empty(min(CHUNK_BYTES, tensor.nbytes), dtype=torch.uint8)
        for start in range(0, tensor.nbytes, CHUNK_BYTES):
            chunk = buffer[: min(CHUNK_BYTES, tensor.nbytes - start)]
            self._read_into(name, start, chunk)
            yield chunk.view(tensor.dtype)

    def _read_into(self, name: str, start: int, buffer: Tensor) -> None:
        path = self._folder / self._tensors[name].file
        with path.open("rb") as file:
            file.seek(self._offsets[name] + start)
            got = file.readinto(buffer.numpy().data)
        if got != buffer.numel():
            raise CheckpointError(
                f"{path}: expected {buffer.numel()} bytes of {name}, got {got}; the file was changed"
            )


def _weight_files(folder: Path) -> tuple[list[str], dict[str, str]]:
    """The weight files of a folder, and the index ``{tensor: file}``, empty when there is one file."""
    if (folder / SINGLE).is_file():
        return [SINGLE], {}
    if not (folder / INDEX).is_file():
        raise CheckpointError(_no_weights(folder))
    index = _read_index(folder / INDEX)
    files = sorted(set(index.values()))
    missing = [file for file in files if not (folder / file).is_file()]
    if missing:
        raise CheckpointError(
            f"{folder}: the index names {len(files)} shards, and {', '.join(missing)} "
            f"{'is' if len(missing) == 1 else 'are'} missing; download the model again"
        )
    return files, index


def _read_index(path: Path) -> dict[str, str]:
    try:
        index = dict(json.loads(path.read_text("utf-8"))["weight_map"])
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f'{path}: expected {{"weight_map": {{tensor: file}}}}; {error!r}'
        ) from None
    for file in index.values():
        if (
            not isinstance(file, str)
            or Path(file).name != file
            or not file.endswith(".safetensors")
        ):
            raise CheckpointError(
                f"{path}: expected .safetensors files of this folder, got {file!r}"
            )
    if not index:
        raise CheckpointError(f"{path}: the index names no tensors")
    return index


def _no_weights(folder: Path) -> str:
    names = sorted(file.name for file in folder.iterdir() if file.is_file())
    expected = f"{folder}: no weights; expected {SINGLE} or {INDEX}"
    pickles = [name for name in names if Path(name).suffix in _PICKLES]
    if pickles:
        return (
            f"{expected}, got {', '.join(pickles)}. These are pickles: reading one can run code, so they "
            f"aren't read. If you trust them, convert once with transformers: "
            f"AutoModelForCausalLM.from_pretrained(folder).save_pretrained(another_folder)"
        )
    others = [name for name in names if name.endswith((".safetensors", ".gguf"))]
    if "adapter_config.json" in names:
        return f"{expected}; the folder holds an adapter: give its base model, and the adapter with --adapter where the command has it"
    return f"{expected}, got {', '.join(others) or 'no weight files'}"


def read_header(path: Path) -> dict[str, tuple[StoredTensor, int]]:
    """The tensors of one file and where they begin in it, in the header's order.

    Raises:
        CheckpointError: the header is broken, or the file is shorter or longer than the header says.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        first = file.read(8)
        length = struct.unpack("<Q", first)[0] if len(first) == 8 else 0
        if not 2 <= length <= min(_LONGEST_HEADER, size - 8):
            raise CheckpointError(
                f"{path}: not a safetensors file, or truncated: its header should take {length} bytes, "
                f"the file has {size}; download it again"
            )
        header = _parse_header(path, file.read(length))
    data = 8 + length
    tensors = {
        name: _tensor(path, name, entry, data)
        for name, entry in header.items()
        if name != "__metadata__"
    }
    end = max((offset + tensor.nbytes for tensor, offset in tensors.values()), default=data)
    if end != size:
        what = "truncated" if size < end else "longer than its header says"
        raise CheckpointError(
            f"{path}: {what}: expected {end} bytes, got {size}; download it again"
        )
    return tensors


def _parse_header(path: Path, text: bytes) -> dict[str, Any]:
    try:
        header = json.loads(text)
    except ValueError as error:  # UnicodeDecodeError and JSONDecodeError are both
        raise CheckpointError(
            f"{path}: broken header, not JSON: {error}; download it again"
        ) from None
    if not isinstance(header, dict):
        raise CheckpointError(
            f"{path}: broken header: expected a table of tensors, got {type(header).__name__}"
        )
    return header


def _tensor(path: Path, name: str, entry: Any, data: int) -> tuple[StoredTensor, int]:
    try:
        stored_as, shape, (begin, end) = (
            entry["dtype"],
            tuple(entry["shape"]),
            entry["data_offsets"],
        )
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{path}: broken header entry of {name}: {entry!r} ({error!r})"
        ) from None
    if not all(isinstance(n, int) and n >= 0 for n in (*shape, begin, end)):
        raise CheckpointError(
            f"{path}: broken header entry of {name}: expected whole numbers, got {entry!r}"
        )
    dtype = getattr(torch, str(_DTYPES.get(str(stored_as))), None)
    if dtype is None:
        raise CheckpointError(
            f"{path}: dtype of {name}: expected one of {', '.join(_DTYPES)}, got {stored_as!r}"
        )
    expected = math.prod(shape) * dtype.itemsize
    if end - begin != expected:
        raise CheckpointError(
            f"{path}: {name} of shape {list(shape)} and dtype {stored_as}: expected {expected} bytes, "
            f"got data_offsets [{begin}, {end}]"
        )
    return StoredTensor(shape, dtype, stored_as, expected, path.name), data + begin
