"""The config of a training in rounds. Importing this module does not import torch."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from modulora_core.errors import OptionError
from modulora_core.training.config import FinetuneConfig, PathName

LEFT_OUT = (
    "adapter", "quantizer", "calibration", "quality", "epochs", "lora_file", "baseline",
    "train_scales",
)  # fmt: skip
"""Fields of a FinetuneConfig that do not fit rounds."""


class RoundsConfig(FinetuneConfig):
    """A training whose adapter is merged into the packed weights every few steps.

    Raises OptionError: as for a FinetuneConfig.
    """

    command: ClassVar[str] = "finetune-packed"
    private: ClassVar[frozenset[str]] = FinetuneConfig.private | {"merge_data"}

    model: PathName = Field(description="packed model: a folder, a file or a Hub id")
    out: PathName = Field(description="new folder for the packed result, or a file as MODEL is one")
    steps: int | None = Field(default=None, ge=1, description="optimizer steps of all rounds")
    merge_every: int | None = Field(
        default=None, ge=1, description="steps of a round; by default one round has all steps"
    )
    merge_data: PathName | None = Field(
        default=None, description="text to merge with; by default the training data"
    )
    merge_samples: int = Field(default=16, ge=1, description="segments of that text")
    merge_seq_len: int = Field(default=512, ge=2, description="tokens of such a segment")

    def rounds(self) -> list[int]:
        """The steps of each round: ``merge_every``, and fewer in the last one.

        Raises OptionError: an option does not fit rounds, or ``steps`` is absent.
        """
        for name in LEFT_OUT:
            default = RoundsConfig.model_fields[name].default
            if getattr(self, name) != default:
                raise OptionError(
                    f"{name}: expected {default} in {self.command}, got {getattr(self, name)}"
                )
        if self.steps is None:
            raise OptionError("steps: expected the number of optimizer steps, got none")
        every = self.merge_every or self.steps
        whole, rest = divmod(self.steps, every)
        return [every] * whole + [rest] * (rest > 0)
