"""The options of a user. Importing this module does not import torch."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field


class Options(BaseModel):
    """How a weight is quantized. Reading it needs only ``bits`` and ``group_size``."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    bits: int = Field(default=4, ge=1, le=8, description="bits of a weight, 1 to 8")
    group_size: int = Field(
        default=64,
        ge=8,
        le=4096,
        description="how many consecutive weights of a row share a scale and an offset, 8 to 4096",
    )
    iterations: int = Field(
        default=20, ge=0, le=1000, description="steps; 0 keeps each group's minimum and maximum"
    )
    p: float = Field(
        default=0.7,
        gt=0,
        le=1,
        description="norm of the error; a smaller one gives outliers less weight",
    )
    beta: float = Field(
        default=10.0,
        gt=0,
        description="penalty, in scales; a larger one treats fewer errors as outliers",
    )
    fit_scale: bool = Field(
        default=True,
        description="fit the scale by least squares; false keeps the group's range, as in HQQ",
    )

    @property
    def levels(self) -> int:
        """The largest code, 2^bits − 1."""
        return int(2**self.bits) - 1

    def groups(self, columns: int) -> int:
        """Groups in a row of so many columns. The last one may be shorter."""
        return -(-columns // self.group_size)
