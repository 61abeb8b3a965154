"""Write safetensors files a tensor at a time.

The safetensors library wants all tensors of a file in memory. Here layouts are known before the
first byte, so headers are written first, and each tensor goes to its place when it comes. The
widest dtypes come first, so that every tensor is aligned. A journal beside the files lists the
parameters that are whole, with a SHA-256 of each tensor, so that a killed run can be resumed. Bytes
are on the disk before the line that says so.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from modulora_core.distributed import from_first, is_first
from modulora_core.errors import CheckpointError, WorkError
from modulora_core.models.folders import INDEX
from modulora_core.models.json_files import repair_journal
from modulora_core.models.safetensors_store import DTYPE_CODES
from modulora_core.spec import TensorLayout

JOURNAL = "written.jsonl"
MAX_SHARD_BYTES = 5 * 10**9
"""The size of a file in transformers: at most 5 GB."""


@dataclass(frozen=True, slots=True)
class Shard:
    """One planned file: its tensors in the order of the file."""

    tensors: Mapping[str, TensorLayout]

    @property
    def nbytes(self) -> int:
        return sum(layout.nbytes for layout in self.tensors.values())

    def header(self) -> bytes:
        entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        for name, start, layout in self.places():
            entries[name] = {"dtype": DTYPE_CODES[layout.dtype], "shape": list(layout.shape),
                             "data_offsets": [start, start + layout.nbytes]}  # fmt: skip
        text = json.dumps(entries, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        return struct.pack("<Q", len(text)) + text

    def places(self) -> Iterator[tuple[str, int, TensorLayout]]:
        """Each tensor with the byte of the data at which it begins."""
        start = 0
        for name, layout in self.tensors.items():
            yield name, start, layout
            start += layout.nbytes


def plan_shards(
    tensors: Mapping[str, TensorLayout], max_bytes: int = MAX_SHARD_BYTES
) -> list[Shard]:
    """Cut ``tensors``, in order, into files of at most ``max_bytes``; one tensor may be larger."""
    groups: list[dict[str, TensorLayout]] = [{}]
    size = 0
    for name, layout in tensors.items():
        if groups[-1] and size + layout.nbytes > max_bytes:
            groups.append({})
            size = 0
        groups[-1][name] = layout
        size += layout.nbytes
    return [Shard(dict(sorted(group.items(), key=_by_alignment))) for group in groups]


def _by_alignment(item: tuple[str, TensorLayout]) -> tuple[int, str]:
    name, layout = item
    return -getattr(torch, layout.dtype).itemsize, name


def shard_names(count: int) -> list[str]:
    """The names that transformers gives the files of a model."""
    if count == 1:
        return ["model.safetensors"]
    return [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]


class ShardWriter:
    """Write planned shards into ``folder``, tensor by tensor, in any order.

    ``resume`` continues with the files and the journal there; ``done`` has the written parameters,
    without those whose bytes have changed since. In a distributed run only the first process
    writes; the others note what it writes. Raises CheckpointError.
    """

    def __init__(self, folder: Path, shards: Sequence[Shard], *, resume: bool = False) -> None:
        self.folder = folder
        self._places: dict[str, tuple[Path, int, TensorLayout]] = {}
        self._nbytes = sum(shard.nbytes for shard in shards)
        self._is_sharded = len(shards) > 1
        self._journal = folder / JOURNAL
        self._writes = is_first()
        # the digests of the tensors of each parameter
        journal = repair_journal(self._journal, dict[str, str]) if resume and self._writes else {}
        for name, shard in zip(shard_names(len(shards)), shards, strict=True):
            self._open(folder / name, shard, resume=bool(journal))
        self.done = from_first({name for name, sums in journal.items() if self._are_there(sums)})

    def _open(self, path: Path, shard: Shard, *, resume: bool) -> None:
        header = shard.header()
        for name, start, layout in shard.places():
            self._places[name] = (path, len(header) + start, layout)
        if not self._writes:
            return
        if not resume:
            with path.open("wb") as file:
                file.write(header)
                file.truncate(len(header) + shard.nbytes)
            return
        with path.open("rb") as file:
            if file.read(len(header)) != header:
                raise CheckpointError(
                    f"{path}: expected the header of this request, got another one; "
                    "start again without --resume"
                )

    def _are_there(self, digests: Mapping[str, str]) -> bool:
        """Whether the bytes of these tensors are the written ones. A hole in a file has others."""
        return all(sha256(_bytes_of(self.read(n))).hexdigest() == d for n, d in digests.items())

    def write(self, parameter: str, tensors: Mapping[str, Tensor]) -> None:
        """Write all tensors of one parameter, then note it in the journal. Raises WorkError."""
        self.done.add(parameter)
        if not self._writes:
            return
        for name, tensor in tensors.items():
            path, offset, layout = self._places[name]
            if TensorLayout.of(tensor) != layout:
                raise WorkError(f"{name}: planned {layout}, got {TensorLayout.of(tensor)}")
            with path.open("r+b") as file:
                file.seek(offset)
                file.write(_bytes_of(tensor))
                file.flush()
                os.fsync(file.fileno())
        digests = {name: sha256(_bytes_of(tensor)).hexdigest() for name, tensor in tensors.items()}
        with self._journal.open("a") as journal:
            journal.write(json.dumps([parameter, digests]) + "\n")

    def read(self, name: str) -> Tensor:
        """Read a tensor that was written, perhaps by the run that is resumed."""
        path, offset, layout = self._places[name]
        tensor = torch.empty(layout.shape, dtype=getattr(torch, layout.dtype))
        with path.open("rb") as file:
            file.seek(offset)
            file.readinto(_bytes_of(tensor))
        return tensor

    def finish(self) -> None:
        """Write the index if there is more than one file, and remove the journal."""
        if self._is_sharded:
            weight_map = {name: path.name for name, (path, _, _) in sorted(self._places.items())}
            index = {"metadata": {"total_size": self._nbytes}, "weight_map": weight_map}
            (self.folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
        self._journal.unlink(missing_ok=True)


def _bytes_of(tensor: Tensor) -> memoryview:
    """A tensor's bytes. They are its own memory if it is contiguous on the CPU."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    if not flat.numel():
        return memoryview(bytearray())
    array: Any = flat.view(torch.uint8).numpy()  # numpy's stubs don't all know that it is a buffer
    return memoryview(array)
