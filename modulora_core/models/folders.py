"""Refuse a folder whose links leave it, and say what a folder without config.json is."""

from __future__ import annotations

from pathlib import Path

from modulora_core.errors import ModelError, RequestError
from modulora_core.models.installed_formats import file_suffixes

MARKER = ".modulora-partial"
"""Marks our own unfinished work, which may be removed. Its writer holds a lock on it."""

REQUEST = "request.json"
"""The request of an unfinished run. Its folder can be resumed, so it is never removed."""

RUN_FILE = "finetune.yaml"
"""The first file that a finetuning run writes into its output folder."""

ADAPTER_CONFIG = "adapter_config.json"
"""The file that only the folder of an adapter has, in PEFT's format."""

WEIGHTS_FILE, SCALES_FILE = "adapter_model.safetensors", "modulora_scales.safetensors"
"""The files of A and B, in PEFT's format, and of channel scales."""

RECORD_FILE = "modulora.json"
"""The file that identifies the base of an adapter."""

INDEX = "model.safetensors.index.json"
"""The file that names the shard of each tensor."""

TEMPLATES = "additional_chat_templates"
"""The subfolder whose files are read too."""

_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth")
"""Suffixes of weights, which are no text that an output would hold."""

HOLDS_AN_ADAPTER = (
    "the folder holds an adapter: give its base model, and the adapter with --adapter "
    "where the command has it"
)


def check_links(folder: Path, error: type[RequestError] = ModelError) -> None:
    """Refuse links to files elsewhere, which an output would hold, and people publish outputs.

    Links may lead to files of the folder, or to the blobs of its entry in the Hub's cache. Links to
    weights may lead anywhere.

    Raises:
        error: another link leads elsewhere.
    """
    inside = folder.resolve()
    roots = [inside]
    if inside.parent.name == "snapshots":
        roots.append(inside.parent.parent / "blobs")
    weights = (*_WEIGHTS, *file_suffixes())
    for path in (*folder.glob("*"), *folder.glob(f"{TEMPLATES}/*")):
        data = path.suffix.lower() not in weights and not path.is_dir()
        if not path.is_symlink() or not (data or path.name == TEMPLATES):
            continue
        target = path.readlink()
        try:
            is_inside = any(path.resolve().is_relative_to(root) for root in roots)
        except (OSError, RuntimeError):  # a circle
            is_inside = False
        if not is_inside:
            raise error(
                f"{path}: expected a file of this folder, got a link to {target}; copy the file "
                "here if you trust it"
            )


def no_config(folder: Path) -> str:
    """Say what a folder without config.json holds, and what to do, for a message."""
    if (folder / ADAPTER_CONFIG).is_file():
        return f"{folder}: no config.json; {HOLDS_AN_ADAPTER}"
    if (folder / RUN_FILE).is_file():
        return (
            f"{folder}: an unfinished run of finetune; go on with it with --resume. The adapters "
            "that it saved are in checkpoints"
        )
    if (folder / MARKER).is_file():
        resumable = (folder / REQUEST).is_file()
        advice = (
            "go on with it with quantize and --resume" if resumable else "run its command again"
        )
        return f"{folder}: an unfinished run, not a model; {advice}"
    suffixes = file_suffixes()
    files = sorted(file for suffix in suffixes for file in folder.glob(f"*{suffix}"))
    if files:
        return f"{folder}: no config.json; for the model in a file give the file: {files[0]}"
    one = "".join(
        f"; of a repository of {suffix} files, download one: hf download REPOSITORY FILE{suffix}"
        for suffix in suffixes
    )
    return (
        f"{folder}: no config.json; expected a folder as transformers' save_pretrained writes it"
        f"{one}"
    )
