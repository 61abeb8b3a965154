"""Copies a packed model, and writes other codes into the copy: names, sizes and scales stay."""

from __future__ import annotations

import shutil
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from modulora_core.checkpoints.foreign.writers import FileWriter, file_writer
from modulora_core.checkpoints.outputs import (
    SMALL_FILES,
    check_disk_space,
    new_file,
    whole_or_nothing,
    write_digests,
)
from modulora_core.checkpoints.packed_checkpoint import PackedCheckpoint
from modulora_core.checkpoints.record import QUANT_METHOD
from modulora_core.errors import ModelError, OptionError
from modulora_core.models.formats import CheckpointFormat, StoredWeight
from modulora_core.models.installed_formats import create_writer
from modulora_core.models.safetensors_store import SafetensorsStore
from modulora_core.spec import PackedWeight


class Copy(ABC):
    """A copy of a packed model.

    Attributes:
        checkpoint: the model; path: the copy's folder or file.
    """

    def __init__(self, checkpoint: PackedCheckpoint, path: Path) -> None:
        self.checkpoint, self.path = checkpoint, path

    @abstractmethod
    def replace(self, name: str, matrices: Sequence[PackedWeight]) -> None:
        """Write other codes of a parameter's packed weights.

        Raises:
            ModelError: the format can't hold them in the place of the present ones.
        """


@contextmanager
def copy_of(checkpoint: PackedCheckpoint, out: Path) -> Iterator[Copy]:
    """Copy a model to ``out``, which appears when the block ends well.

    Raises:
        OutputError: ``out`` holds something else.
        ModelError, PluginError: the model's format is only read.
    """
    path = checkpoint.path
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    check_disk_space(out, sum(file.stat().st_size for file in files) + SMALL_FILES)
    if path.is_file():
        file_format = file_writer(out)
        if file_format.spec.name != checkpoint.format:
            raise OptionError(f"{out}: expected a file of {checkpoint.format}, as {path.name} is")
        with new_file(out, file_format.spec.file_suffix) as partial:
            shutil.copyfile(path, partial)
            yield _OfFile(checkpoint, partial, file_format)
        return
    writer = None if checkpoint.format == QUANT_METHOD else create_writer(checkpoint.format)
    with whole_or_nothing(out) as folder:
        shutil.copytree(path, folder, dirs_exist_ok=True)
        yield (
            _OfFolder(checkpoint, folder)
            if writer is None
            else _OfForeign(checkpoint, folder, writer)
        )
        write_digests(folder)


class _OfFile(Copy):
    """A file of another tool, whose plugin finds the bytes."""

    def __init__(self, checkpoint: PackedCheckpoint, path: Path, format: FileWriter) -> None:
        super().__init__(checkpoint, path)
        self.format = format

    def replace(self, name: str, matrices: Sequence[PackedWeight]) -> None:
        self.format.replace(self.checkpoint, self.path, name, matrices)


class _OfFolder(Copy):
    """A folder of ours."""

    def __init__(self, checkpoint: PackedCheckpoint, path: Path) -> None:
        super().__init__(checkpoint, path)
        self.store = SafetensorsStore(path)

    def replace(self, name: str, matrices: Sequence[PackedWeight]) -> None:
        prefixes = self.checkpoint.record.site(name).prefixes(name)
        for prefix, packed in zip(prefixes, matrices, strict=True):
            for key, tensor in packed.tensors.items():
                self.overwrite(f"{prefix}.{key}", tensor)

    def overwrite(self, name: str, tensor: Tensor) -> None:
        """Write a tensor of the copy, which has its dtype and shape already."""
        with (self.path / self.store.tensors[name].file).open("r+b") as file:
            file.seek(self.store.offset(name))
            file.write(tensor.cpu().contiguous().view(torch.uint8).numpy().data)


class _OfForeign(_OfFolder):
    """A folder of another tool. A tensor is written only if its bytes were as we write them."""

    def __init__(self, checkpoint: PackedCheckpoint, path: Path, format: CheckpointFormat) -> None:
        super().__init__(checkpoint, path)
        self.format = format

    def replace(self, name: str, matrices: Sequence[PackedWeight]) -> None:
        before = self._tensors(name, [*self.checkpoint.packed(name)])
        for key, tensor in self._tensors(name, matrices).items():
            if torch.equal(tensor, before[key]):
                continue
            if key not in self.store.tensors or not torch.equal(self.store.read(key), before[key]):
                raise ModelError(
                    f"{key}: expected the tensor of {self.format.spec.name} as modulora writes it, "
                    "got another form; rewrite the model with `modulora convert MODEL OUT --to "
                    "modulora`, and merge into that"
                )
            self.overwrite(key, tensor)

    def _tensors(self, name: str, matrices: Sequence[PackedWeight]) -> dict[str, Tensor]:
        """The tensors of a parameter, by their names in the files."""
        site, module = self.checkpoint.record.site(name), name.removesuffix(".weight")

        def read(part: str) -> Tensor:
            index, _, key = part.rpartition(".")
            return matrices[int(index or 0)].tensors[key]

        weight = StoredWeight(
            module, self.checkpoint.quantizer(site), site.layout, read, site.experts,
            site.transposed,
        )  # fmt: skip
        prefix = f"{module}{'_' if site.experts else '.'}"
        return {prefix + part: tensor for part, tensor in self.format.tensors(weight).items()}
