"""Two vectors that scale a packed weight: diag(v) Ŵ diag(u). Adapters train them, and so does tuning while a model is quantized."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from modulora_core.errors import ShapeError


@dataclass(frozen=True, slots=True)
class ChannelScales:
    """What a packed weight is scaled by: diag(v) Ŵ diag(u).

    Attributes:
        input: u, ``[in]``.
        output: v, ``[out]``.

    Raises:
        ShapeError: one of them is no vector.
    """

    input: Tensor
    output: Tensor

    def __post_init__(self) -> None:
        if self.input.dim() != 1 or self.output.dim() != 1:
            raise ShapeError(f"channel scales: expected two vectors, got {list(self.input.shape)} and "
                             f"{list(self.output.shape)}")  # fmt: skip

    def of_rows(self, start: int, stop: int, W: Tensor) -> Tensor:
        """Rows ``[start, stop)`` of diag(v) Ŵ diag(u), in ``W``'s dtype, from those of Ŵ: ``W``, ``[stop - start, in]``."""
        return W * self.output[start:stop, None].to(W.dtype) * self.input.to(W.dtype)
