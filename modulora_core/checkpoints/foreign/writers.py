"""The interfaces of plugins that write adapters and merged models, and how to find one."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Protocol

from modulora_core.checkpoints.outputs import check_new_file
from modulora_core.checkpoints.packed_checkpoint import PackedCheckpoint
from modulora_core.errors import ModelError, OptionError
from modulora_core.hookspecs import FormatSpec
from modulora_core.models.installed_formats import InstalledFormat, file_format, unread_file
from modulora_core.models.locate import names_file
from modulora_core.progress import Display
from modulora_core.spec import PackedWeight

__all__ = ["AdapterFile", "AdapterWriter", "FileWriter", "MergedFile", "WrittenAdapter"]

RETAINED = 0.5
"""An update of which less is left in the quantized weight counts as erased."""


@dataclass(frozen=True, slots=True)
class AdapterFile:
    """The file of an adapter that was written.

    Attributes:
        modules: the number of adapted weights.
        beside: further files that other programs need.
    """

    out: str
    base: str
    architecture: str
    modules: int
    beside: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, slots=True)
class MergedFile:
    """The file of a model that was written.

    Attributes:
        types: the number of tensors of each type.
        adapted: the number of parameters that the adapter changed.
        retained: the part of the update that quantizing leaves in each changed tensor, the
            projection ⟨Q(W + ΔW) - W, ΔW⟩ / ‖ΔW‖². 1 is all, 0 is nothing.
    """

    out: str
    base: str
    types: dict[str, int]
    bytes: int
    adapted: int
    seconds: float
    peak_memory_bytes: int
    retained: dict[str, float] = field(repr=False)

    @property
    def erased(self) -> list[str]:
        """The tensors that lost more than half of their update."""
        return [name for name, part in self.retained.items() if part < RETAINED]

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "erased": self.erased}


class WrittenAdapter(Protocol):
    """The result of writing an adapter, which has facts to print."""

    def to_json(self) -> dict[str, Any]: ...


class AdapterWriter(ABC):
    """Writes an adapter of ours for another tool. Subclass it, and name it as the ``location`` of a
    :class:`~modulora_core.hookspecs.FormatSpec` with ``adapters=True``."""

    def __init__(self, spec: FormatSpec) -> None:
        self.spec = spec

    @abstractmethod
    def write_adapter(
        self, adapter: str, out: str | Path, *, model: str | None = None
    ) -> WrittenAdapter:
        """Write an adapter to ``out``.

        Args:
            adapter: a LoRA adapter in PEFT's format, a folder or Hub id.
            out: a new or empty folder.
            model: the packed model of the adapter, a folder or Hub id, if the user names one.

        Raises:
            OptionError: the format needs ``model``.
            AdapterError: the adapter does not fit the model, or the format can't hold it.
            RequestError: the model can't be read, or ``out`` holds something else.
        """


class FileWriter(AdapterWriter):
    """The way back to files of a format. Subclass it, and name it as the ``writer`` of the plugin's
    :class:`~modulora_core.hookspecs.FormatSpec`.

    Attributes:
        default_type: the type of changed weights in a merged file, by its name in the format.
    """

    default_type: ClassVar[str]

    @abstractmethod
    def write_adapter(
        self, adapter: str, out: str | Path, *, model: str | None = None
    ) -> AdapterFile:
        """Write A and B of an adapter to ``out``, a new file with the format's suffix.

        ``model`` is the file that the adapter will be used with, or ``package:NAME``; by default
        the base that the adapter names.
        """

    def check_adapter_file(self, out: Path) -> None:
        """Raise OutputError if :meth:`write_adapter` can't write ``out``, before any work."""
        check_new_file(out, self.spec.file_suffix)

    @abstractmethod
    def merge(
        self,
        model: str,
        out: str | Path,
        *,
        adapter: str | None = None,
        type: str | None = None,
        base: str | None = None,
        progress: Display = True,
    ) -> MergedFile:
        """Write ``model``, with ``adapter`` merged in, as the file ``out``.

        Args:
            model: a packed model: a file of this format, a folder, or a Hub id.
            out: a new file with the format's suffix.
            adapter: a LoRA adapter in PEFT's format, a folder or Hub id.
            type: the type of changed weights; by default :attr:`default_type`.
            base: a file of the same model, for metadata and tokenizer; by default ``model``.
            progress: called as ``progress("merging", done, total)`` after each tensor.

        Raises:
            OptionError: no such type, or no base.
            OutputError: ``out`` exists, or has another suffix.
            ModelError: a parameter has no place in the file.
            AdapterError: the adapter does not fit the model.
            RequestError: the model is not packed or cannot be read.
        """

    def replace(
        self, model: PackedCheckpoint, path: Path, parameter: str, matrices: Sequence[PackedWeight]
    ) -> None:
        """Write other packed weights of a parameter of ``model``, of the same layout, into
        ``path``, a copy of its file. Raises ModelError, as the default does: it has no place."""
        del path, matrices
        raise ModelError(f"{model.name}: {self.spec.name} has no place for {parameter} alone")


def file_writer(out: str | Path) -> FileWriter:
    """The writer of files with the suffix of ``out``.

    Raises:
        OptionError: no installed plugin writes such a file.
        PluginError: the plugin can't be used.
    """
    writer = writer_of(file_format(out))
    if writer is None:
        raise OptionError(f"{out}: {unread_file(out)}")
    return writer


def writer_of(found: InstalledFormat | None) -> FileWriter | None:
    """The writer of files of a format; None if it is only read. Raises PluginError."""
    if found is None or found.spec.writer is None:
        return None
    return found.create(found.spec.writer, FileWriter)  # type: ignore[type-abstract]


def base_file(checkpoint: PackedCheckpoint, model: str) -> str | None:
    """The file of a packed model: ``model`` itself, or the packaged file it was made from."""
    if names_file(model):
        return model
    source = checkpoint.record.source
    return str(source["name"]) if source.get("kind") == "package" else None
