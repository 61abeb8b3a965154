"""What a user may choose. Importing this module does not import torch."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

SMALLEST_GROUP = 16
WHOLE_ROW = -1


class Options(BaseModel):
    """How a weight is quantized. The defaults are those that measured best (README, Quality)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    bits: Literal[2, 3, 4, 8] = Field(4, description="bits of a weight: 2, 3, 4 or 8")
    group_size: int = Field(
        64,
        description="how many weights of a row share a scale and a zero point: 16 or more; -1 for the whole row",
    )
    symmetric: bool = Field(
        False,
        description="one fixed zero point in the middle of the codes: saves its bits, costs quality",
    )
    act_order: bool = Field(
        True,
        description="quantize the columns with the largest inputs first, while others can still make up for it",
    )
    static_groups: bool = Field(
        True,
        description="choose all scales before the first column, from the weight as it was given",
    )
    range_search: bool = Field(
        True,
        description="search each group's range for the least error, instead of taking its extremes",
    )
    damping: float = Field(
        0.1,
        gt=0,
        le=1,
        description="share of the mean of H's diagonal that is added to it: less trusts the calibration text more; "
        "raised where H can't be factorized",
    )

    @field_validator("group_size")
    @classmethod
    def _group(cls, value: int) -> int:
        if value != WHOLE_ROW and value < SMALLEST_GROUP:
            raise ValueError(f"expected {SMALLEST_GROUP} or more, or {WHOLE_ROW}")
        return value

    @property
    def levels(self) -> int:
        """The largest code, 2^bits − 1: the paper's maxq."""
        return int(2**self.bits) - 1

    def group(self, columns: int) -> int:
        """Columns of a group in a weight of so many columns (at least 1); the last group may be shorter."""
        return max(1, columns if self.group_size == WHOLE_ROW else min(self.group_size, columns))

    def groups(self, columns: int) -> int:
        """How many groups hold so many columns."""
        return -(-columns // self.group(columns))

    def permutes(self, columns: int) -> bool:
        """Whether a weight of so many columns is stored with its columns in the order of quantization.

        Where groups belong to that order. One group is the same in any order, and static groups are the weight's own.
        """
        return self.act_order and not self.static_groups and self.groups(columns) > 1
