"""Checkpoints of a run in training: whole or ignored.

transformers' Trainer writes the files of a checkpoint into its final folder, one by one. If it is
killed there, the folder looks complete. So we *seal* a checkpoint once it is on the disk, and
resume from sealed ones only.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import BaseModel, Field

from modulora_core.checkpoints.outputs import digest, digests_of, sync_folder, write_file
from modulora_core.errors import CheckpointError
from modulora_core.models.json_files import read_json

if TYPE_CHECKING:
    from transformers import TrainerState

_SEAL = "complete.json"


class _Seal(BaseModel):
    """The digests of a checkpoint's files, and the number of processes that trained it."""

    files: dict[str, str]
    processes: int = Field(1, ge=1)


def seal(checkpoint: Path, processes: int = 1) -> None:
    """Mark a checkpoint as whole: sync its files to the disk, then record their SHA-256."""
    sync_folder(checkpoint)
    files = digests_of(checkpoint, without=(_SEAL,))
    text = json.dumps({"files": files, "processes": processes}, indent=2)
    write_file(checkpoint / _SEAL, text)


def processes_of(checkpoint: Path) -> int:
    """The number of processes that trained up to a whole checkpoint."""
    return read_json(checkpoint / _SEAL, _Seal).processes


def is_sealed(checkpoint: Path) -> bool:
    """Whether a checkpoint is whole: it has a seal, and its files have the recorded bytes."""
    try:
        files = read_json(checkpoint / _SEAL, _Seal).files
        return all(digest(checkpoint / name) == found for name, found in files.items())
    except (OSError, ValueError, CheckpointError):  # ValueError: a name with a null byte
        return False


def latest_checkpoint(folder: Path) -> Path | None:
    """The last whole checkpoint in ``folder``, or None."""
    whole = [checkpoint for checkpoint in folder.glob("checkpoint-*") if is_sealed(checkpoint)]
    return max(whole, key=lambda checkpoint: int(checkpoint.name.rpartition("-")[2]), default=None)


def remove_half_written(folder: Path) -> None:
    """Remove the checkpoints in ``folder`` that are not whole."""
    for checkpoint in folder.glob("checkpoint-*"):
        if not is_sealed(checkpoint):
            shutil.rmtree(checkpoint)


def trainer_state(checkpoint: Path) -> TrainerState:
    """The state of transformers' Trainer in a checkpoint."""
    from transformers import TrainerState  # imports torch, as an early check must not

    return TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
