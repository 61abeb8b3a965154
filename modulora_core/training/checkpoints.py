"""Checkpoints of a run in training: whole or absent.

transformers' Trainer writes a checkpoint file by file into its final place. A folder that it was killed in
looks like any other; so a checkpoint is *sealed* once it is on the disk, and only sealed ones are used.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from modulora_core.checkpoints.outputs import sync_folder, write_file

TRAINER_STATE = "trainer_state.json"
_SEAL = "complete.json"


def seal(checkpoint: Path) -> None:
    """Mark a checkpoint as whole: note the sizes of its files, once they are on the disk."""
    sync_folder(checkpoint)
    sizes = {file.name: file.stat().st_size for file in sorted(checkpoint.iterdir())}
    write_file(checkpoint / _SEAL, json.dumps({"files": sizes}, indent=2))


def is_sealed(checkpoint: Path) -> bool:
    """Whether a checkpoint is whole: it is sealed, and its files have the sizes of that moment."""
    try:
        sizes = json.loads((checkpoint / _SEAL).read_text("utf-8"))["files"]
        return all((checkpoint / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, KeyError):
        return False


def latest_checkpoint(folder: Path) -> Path | None:
    """The last whole checkpoint in ``folder``."""
    whole = [checkpoint for checkpoint in folder.glob("checkpoint-*") if is_sealed(checkpoint)]
    return max(whole, key=lambda checkpoint: int(checkpoint.name.rpartition("-")[2]), default=None)


def remove_half_written(folder: Path) -> None:
    """Remove the checkpoints in ``folder`` that aren't whole: nothing can use them."""
    for checkpoint in folder.glob("checkpoint-*"):
        if not is_sealed(checkpoint):
            shutil.rmtree(checkpoint)
