"""Channel scales of a packed weight: a vector for its inputs, and one for its outputs.

Adapters store them, and tuning folds them into packed weights.
"""

from __future__ import annotations

from torch import Tensor

from modulora_core.arguments import checked_dataclass
from modulora_core.errors import ShapeError


@checked_dataclass
class ChannelScales:
    """Two vectors u and v that replace Ŵ by diag(v) Ŵ diag(u).

    Attributes:
        input: u, ``[in]``.
        output: v, ``[out]``.

    Raises:
        ShapeError: one of them is not a vector.
    """

    input: Tensor
    output: Tensor

    def __post_init__(self) -> None:
        if self.input.dim() != 1 or self.output.dim() != 1:
            shapes = f"{list(self.input.shape)} and {list(self.output.shape)}"
            raise ShapeError(f"channel scales: expected two vectors, got {shapes}")

    def of_rows(self, start: int, stop: int, W: Tensor) -> Tensor:
        """Scale ``W``, rows ``[start, stop)`` of Ŵ, ``[stop - start, in]``; in its dtype."""
        return W * self.output[start:stop, None].to(W.dtype) * self.input.to(W.dtype)
