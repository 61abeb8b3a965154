"""The format of GGUF files behind the core's hook: opened as models, and written back."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from modulora_core.adapters.files import AdapterFile, FileWriter, MergedFile
from modulora_core.models.formats import FileFormat
from modulora_core.progress import Progress
from modulora_gguf.file.lora_file import export_for_llama_cpp
from modulora_gguf.file.merging import DEFAULT_TYPE, merge_to_gguf
from modulora_gguf.file.model import GGUFModel


class GGUFFormat(FileFormat):
    """A whole model in a GGUF file."""

    def open(self, path: Path) -> GGUFModel:
        return GGUFModel(path)


class GGUFWriter(FileWriter):
    """LoRA files and merged files of llama.cpp."""

    default_type = DEFAULT_TYPE

    def write_adapter(
        self, adapter: str, out: str | Path, *, model: str | None = None
    ) -> AdapterFile:
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
        kind = type or self.default_type
        return merge_to_gguf(model, out, adapter=adapter, type=kind, base=base, progress=progress)
