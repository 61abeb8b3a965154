"""What a user may choose. Importing this module does not import torch."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field


class Options(BaseModel):
    """How a weight is quantized; only ``bits`` and ``group_size`` are needed to read it again."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    bits: int = Field(default=4, ge=1, le=8, description="bits of a weight: 1 to 8")
    group_size: int = Field(
        default=64,
        ge=8,
        le=4096,
        description="how many consecutive weights of a row share a scale and an offset: 8 to 4096; the last group of a "
        "row may be shorter",
    )
    iterations: int = Field(
        default=20,
        ge=0,
        le=1000,
        description="steps of the optimization: 0 keeps each group's minimum and maximum",
    )
    p: float = Field(
        default=0.7,
        gt=0,
        le=1,
        description="the norm of the error: the smaller, the less outliers count",
    )
    beta: float = Field(
        default=10.0,
        gt=0,
        description="penalty of the splitting: the larger, the smaller are the errors that count as outliers; in "
        "scales, so that a weight and a multiple of it get the same codes",
    )
    fit_scale: bool = Field(
        default=True,
        description="fit the scale by least squares in each step; false keeps it at the group's range, as HQQ does",
    )

    @property
    def levels(self) -> int:
        """The largest code, 2^bits − 1."""
        return int(2**self.bits) - 1

    def groups(self, columns: int) -> int:
        """How many groups a row of so many columns has."""
        return -(-columns // self.group_size)
