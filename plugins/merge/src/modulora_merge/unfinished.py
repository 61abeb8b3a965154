"""Keeps the merged weights of an interrupted run, for --resume."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load, save
from torch import Tensor

from modulora_core.checkpoints.outputs import only_writer, write_file
from modulora_core.errors import OptionError, OutputError
from modulora_core.hf.peft_format import AdapterDelta
from modulora_core.models.folders import REQUEST
from modulora_core.models.json_files import read_bytes, read_json
from modulora_core.spec import PackedWeight


@dataclass(frozen=True, slots=True)
class Unfinished:
    """The merged parameters of a run: a file for each, in ``OUT.merging``."""

    folder: Path

    def _file(self, name: str) -> Path:
        return self.folder / f"{name}.safetensors"

    def has(self, name: str) -> bool:
        return self._file(name).is_file()

    def write(self, name: str, matrices: Sequence[PackedWeight]) -> None:
        tensors = {
            f"{number}.{key}": tensor.cpu()
            for number, packed in enumerate(matrices)
            for key, tensor in packed.tensors.items()
        }
        write_file(self._file(name), save(tensors))

    def read(self, name: str, before: Sequence[PackedWeight]) -> list[PackedWeight]:
        """The merged matrices, which have the layouts of the model's, ``before``."""
        tensors = load(read_bytes(self._file(name), OutputError))
        return [
            packed.layout.fill({key: tensors[f"{number}.{key}"] for key in packed.tensors})
            for number, packed in enumerate(before)
        ]


@contextmanager
def unfinished(out: Path, request: Mapping[str, Any], *, resume: bool) -> Iterator[Unfinished]:
    """Open ``OUT.merging``. It is removed at the end, and stays after an interruption.

    Args:
        request: identifies the run; a resumed run must have the same.

    Raises:
        OutputError: without ``resume`` there is an unfinished run, or another process writes it.
        OptionError: the unfinished run had another request.
    """
    folder = out.with_name(out.name + ".merging")
    with only_writer(folder):
        if (folder / REQUEST).is_file():
            before = read_json(folder / REQUEST, dict[str, Any], advice="remove the folder")
            if not resume:
                raise OutputError(
                    f"temporary folder {folder}: expected it free, it holds an unfinished merge; "
                    "go on with it with --resume, or remove it"
                )
            changed = ", ".join(key for key in request if request[key] != before.get(key))
            if changed:
                raise OptionError(
                    f"{folder}: expected the request of the unfinished merge, got another "
                    f"{changed}; ask for the same, or remove the folder"
                )
        elif any(folder.iterdir()):
            raise OutputError(f"temporary folder {folder}: expected it free; remove or rename it")
        else:
            write_file(folder / REQUEST, json.dumps(request))
        try:
            yield Unfinished(folder)
        except BaseException:
            if any(folder.glob("*.safetensors")):
                raise
            (folder / REQUEST).unlink()
            raise
        for file in folder.iterdir():
            file.unlink()


def digest_of_deltas(deltas: Mapping[str, AdapterDelta]) -> str:
    """A digest of the values of an adapter."""
    found = hashlib.sha256()
    for name in sorted(deltas):
        delta = deltas[name]
        found.update(f"{name} {delta.scale}".encode())
        scales = delta.channel_scales
        vectors = [] if scales is None else [scales.input, scales.output]
        for tensor in (delta.A, delta.B, *vectors):
            found.update(digest_of(tensor).encode())
    return found.hexdigest()


def digest_of(tensor: Tensor) -> str:
    """A digest of the bytes of a tensor."""
    return hashlib.sha256(save({"": tensor.cpu().contiguous()})).hexdigest()


def files_of(path: Path) -> list[list[object]]:
    """The name, size and time of a model's files: cheap marks of the same values."""
    files = [path] if path.is_file() else sorted(path.glob("*.safetensors"))
    return [[file.name, (stat := file.stat()).st_size, stat.st_mtime_ns] for file in files]
