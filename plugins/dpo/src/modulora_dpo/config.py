"""The config of a run of DPO. Importing this module does not import torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

from pydantic import Field
from typing_extensions import override

from modulora_core.data.files import Record
from modulora_core.training.config import FinetuneConfig
from modulora_dpo.preferences import check_preferences

FIXED = ("format", "prompt", "completion", "packing")
"""Options of finetune that preferences do not have."""


class PreferenceConfig(FinetuneConfig):
    """A run that trains an adapter on preferences.

    Raises:
        OptionError: as for a FinetuneConfig.
    """

    command: ClassVar[str] = "dpo"

    format: Literal["auto"] = "auto"
    prompt: None = None
    completion: None = None
    packing: Literal[False] = False

    lr: float = Field(default=5e-5, gt=0, description="peak learning rate")
    dropout: float = Field(
        default=0.0,
        ge=0,
        lt=1,
        description="dropout of the adapter's input: noise blurs its difference from the reference",
    )

    @override
    def check_records(self, records: Sequence[Record]) -> None:
        check_preferences(records)
