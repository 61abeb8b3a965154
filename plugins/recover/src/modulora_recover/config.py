"""The config of a recovery. Importing this module does not import torch."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from modulora_core.training.config import FinetuneConfig, PathName


class RecoverConfig(FinetuneConfig):
    """A run that trains an adapter on the dense model's predictions of the data.

    Raises:
        OptionError: as for a FinetuneConfig.
    """

    command: ClassVar[str] = "recover"
    private: ClassVar[frozenset[str]] = FinetuneConfig.private | {"original"}

    original: PathName = Field(
        description="dense model to learn from, usually the one that was quantized; its "
        "predictions take 384 bytes a trained token in OUT until the end"
    )
    weight: float = Field(
        default=1.0,
        gt=0,
        le=1,
        description="weight of the dense model's predictions in the loss; the data's own labels "
        "have the rest",
    )
