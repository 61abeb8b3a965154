"""GGUF files as models: the classes that the hook names.

They import :mod:`modulora_gguf.file` on first use."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from modulora_core.adapters.files import AdapterFile, FileWriter, MergedFile
from modulora_core.models.formats import FileFormat, ModelFile
from modulora_core.progress import Progress


class File(FileFormat):
    """A whole model in a GGUF file."""

    def open(self, path: Path) -> ModelFile:
        from modulora_gguf.file.opened import OpenedGGUF

        return OpenedGGUF(path)


class Writer(FileWriter):
    """LoRA files and merged files of llama.cpp."""

    default_type = "Q8_0"

    def write_adapter(
        self, adapter: str, out: str | Path, *, model: str | None = None
    ) -> AdapterFile:
        from modulora_gguf.file.lora_file import export_for_llama_cpp

        return export_for_llama_cpp(adapter, out, model=model)

    def merge(
        self,
        model: str,
        out: str | Path,
        *,
        adapter: str | None = None,
        type: str | None = None,
        base: str | None = None,
        progress: Progress | Literal[False] | None = None,
    ) -> MergedFile:
        from modulora_gguf.file.merging import merge_to_gguf

        kind = type or self.default_type
        return merge_to_gguf(model, out, adapter=adapter, type=kind, base=base, progress=progress)
