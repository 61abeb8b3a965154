"""What a user may choose. Importing this module does not import torch."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class Options(BaseModel):
    """How a weight is quantized. The defaults are those that measured best (README, Quality)."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    bits: Literal[2, 3, 4] = Field(2, description="bits of a weight: 2, 3 or 4")
    rescale: bool = Field(
        True, description="even out what columns weigh and what their inputs do, before rotating"
    )
    sweeps: int | None = Field(
        None,
        ge=0,
        le=100,
        description="times that every block of eight weights is rounded once more, the others given; by default 4, and none at 4 bits",
    )
    damping: float = Field(
        0.1,
        gt=0,
        le=1,
        description="share of the mean of H's diagonal that is added to it; raised where H can't be factorized",
    )
    codebook_scale: float | None = Field(
        None,
        gt=0.1,
        lt=10,
        description="root mean square of the weights when they are rounded, in units of the codebook; "
        "by default the best one for a Gaussian",
    )
    seed: int = Field(0, ge=0, lt=2**32, description="of the random signs")

    @property
    def rounds(self) -> int:
        """:attr:`sweeps`, or its default: at 4 bits they follow the samples and lose on other text (README, Quality)."""
        return self.sweeps if self.sweeps is not None else 0 if self.bits == 4 else 4
