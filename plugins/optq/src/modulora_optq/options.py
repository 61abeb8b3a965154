"""The options of a weight. Importing this module does not import torch."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator

SMALLEST_GROUP = 16
WHOLE_ROW = -1


class Options(BaseModel):
    """How a weight is quantized. The defaults measured best (README, Quality)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    bits: Literal[2, 3, 4, 8] = Field(default=4, description="bits of a weight: 2, 3, 4 or 8")
    group_size: int = Field(
        default=64,
        description="how many weights of a row share a scale and a zero point: 16 or more; "
        "-1 for the whole row",
    )
    symmetric: bool = Field(
        False, description="fix the zero point in the middle: saves its bits, costs quality"
    )
    act_order: bool = Field(
        True,
        description="quantize the columns with the largest inputs first, while later columns can "
        "still compensate their error",
    )
    static_groups: bool = Field(
        True, description="choose all scales before the first column, from the original weight"
    )
    range_search: bool = Field(
        True, description="search each group's range for the least error; otherwise its extremes"
    )
    sweeps: int = Field(
        default=2,
        ge=0,
        le=100,
        description="rounds of coordinate descent over codes and scales after OPTQ",
    )
    damping: float = Field(
        default=0.2,
        gt=0,
        le=1,
        description="share of the mean of H's diagonal that is added to it: more follows the "
        "calibration text less; doubled until H can be factorized",
    )

    @field_validator("group_size")
    @classmethod
    def _group(cls, value: int) -> int:
        if value != WHOLE_ROW and value < SMALLEST_GROUP:
            raise ValueError(f"expected {SMALLEST_GROUP} or more, or {WHOLE_ROW}")
        return value

    @classmethod
    def of(cls, **metadata: Any) -> Self:
        """The options that a packed weight's metadata record. Raises ValueError for others."""
        return cls.model_validate({k: v for k, v in metadata.items() if k != "permuted"})

    def metadata(self, permuted: bool) -> dict[str, Any]:
        """The metadata of a packed weight."""
        recorded = self.model_dump(include={"bits", "group_size", "symmetric"})
        return recorded | {"permuted": permuted}

    @property
    def maxq(self) -> int:
        """The largest code, 2^bits − 1."""
        return int(2**self.bits) - 1

    @property
    def middle(self) -> int:
        """The zero point of a symmetric weight."""
        return int(2 ** (self.bits - 1))

    def group(self, columns: int) -> int:
        """Columns of a group, at least 1, in a weight of so many. The last group may be short."""
        return max(1, columns if self.group_size == WHOLE_ROW else min(self.group_size, columns))

    def groups(self, columns: int) -> int:
        """The number of groups in a row of so many columns."""
        return -(-columns // self.group(columns))

    def permutes(self, columns: int) -> bool:
        """Whether the columns of a weight are stored in the order in which they are quantized.

        They are with act-order, without static groups, and with more than one group. A group then
        consists of columns that follow each other in that order.
        """
        return self.act_order and not self.static_groups and self.groups(columns) > 1
