"""``OUT/log.json``: the log of a finished run, from which a report can be made."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from modulora_core.errors import AdapterError
from modulora_core.models.json_files import read_json

LOG_FILE = "log.json"


@dataclass(frozen=True, slots=True)
class HeldOut:
    """The loss on ``examples`` of the training data that the run did not reach.

    Attributes:
        before: the loss without the adapter; after: the loss with it.
    """

    before: float
    after: float
    examples: int


class RunLog(BaseModel):
    """The log of a finished run.

    Attributes:
        model: the packed model, as a command takes it.
        source: the name of the model before quantization.
        quantizers, bits_per_weight: how the model is quantized.
        seconds, peak_memory_bytes, held_out: as in
            :class:`modulora_core.training.finetune.FinetuneResult`.
        log_history: Trainer's ``log_history``.
    """

    model_config = ConfigDict(frozen=True)

    model: str
    source: str
    quantizers: tuple[str, ...]
    bits_per_weight: float
    seconds: float
    peak_memory_bytes: int
    held_out: HeldOut | None = None
    log_history: list[dict[str, Any]]

    @classmethod
    def read(cls, folder: Path) -> RunLog:
        """Read the log of the run that wrote ``folder``. Raises AdapterError."""
        file = folder / LOG_FILE
        if not file.is_file():
            got = f"a folder without {LOG_FILE}" if folder.is_dir() else "no such folder"
            raise AdapterError(
                f"{folder}: expected the folder of a finished run of finetune, got {got}"
            )
        return read_json(file, cls, error=AdapterError, advice="copy it again, or train again")
