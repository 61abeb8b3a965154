"""Say what a folder without config.json is: an adapter, an unfinished run, or unknown."""

from __future__ import annotations

from pathlib import Path

from modulora_core.models.formats import file_suffixes

MARKER = ".modulora-partial"
"""Marks our own unfinished work, which may be removed. Its writer holds a lock on it."""

REQUEST = "request.json"
"""The request of an unfinished run. Its folder can be resumed, so it is never removed."""

RUN_FILE = "finetune.yaml"
"""The first file that a finetuning run writes into its output folder."""

HOLDS_AN_ADAPTER = (
    "the folder holds an adapter: give its base model, and the adapter with --adapter "
    "where the command has it"
)


def no_config(folder: Path) -> str:
    """Say what a folder without config.json holds, and what to do, for a message."""
    if (folder / "adapter_config.json").is_file():
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
