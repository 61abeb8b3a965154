"""Rounds weights to the grid of a packed weight, whose scales stay: for codes of single weights.

    point of code c = scale · (level[c] − zero) + offset

Integers, floats of few bits and codebooks of single numbers are such grids. A quantizer says what
its grid is, and :class:`ScalarGrid` does the rest of ``snap`` and ``snapped``.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from modulora_core.spec import PackedWeight, Quantizer
from modulora_core.tiles import tile_bytes, tile_ranges


@dataclass(frozen=True, slots=True)
class Grid:
    """The points of some rows and columns of a packed weight.

    Attributes:
        levels: fp32 ``[codes]``, by code, in any order.
        scale: fp32, of the weights' shape or expandable to it; ``zero`` and ``offset`` likewise.
    """

    levels: Tensor
    scale: Tensor
    zero: Tensor | float = 0.0
    offset: Tensor | float = 0.0

    def points(self, codes: Tensor) -> Tensor:
        """The points of ``codes``, fp32."""
        return self.scale * (self.levels[codes.to(torch.int32)] - self.zero) + self.offset

    def nearest(self, V: Tensor) -> Tensor:
        """The codes of the points nearest to V, int64. Any code, where the scale is zero."""
        levels, order = self.levels.sort()
        at = (V - self.offset) / self.scale + self.zero
        return order[torch.bucketize(at, (levels[1:] + levels[:-1]) / 2)]


class ScalarGrid(Quantizer):
    """Adds ``snap`` and ``snapped`` to a quantizer with a :class:`Grid`."""

    @property
    def snaps(self) -> bool:
        return True

    @abstractmethod
    def grid(self, packed: PackedWeight, rows: tuple[int, int], columns: tuple[int, int]) -> Grid:
        """The grid of rows and columns ``[start, stop)`` of Ŵ."""

    @abstractmethod
    def codes(self, packed: PackedWeight) -> Tensor:
        """The codes of all weights, uint8 ``[out, in]``: indices of the grid's levels."""

    @abstractmethod
    def with_codes(self, packed: PackedWeight, codes: Tensor) -> PackedWeight:
        """``packed`` with other codes, as :meth:`codes` gives them."""

    def snap(
        self, packed: PackedWeight, rows: tuple[int, int], columns: tuple[int, int], V: Tensor
    ) -> Tensor:
        grid = self.grid(packed, rows, columns)
        return grid.points(grid.nearest(V))

    def snapped(self, packed: PackedWeight, V: Tensor) -> PackedWeight:
        (out_features, in_features), codes = packed.shape, self.codes(packed).clone()
        for start, stop in tile_ranges(out_features, 8 * in_features, tile_bytes(V.device)):
            grid, old = self.grid(packed, (start, stop), (0, in_features)), codes[start:stop]
            new = grid.nearest(V[start:stop])
            # several codes may have one point: 0 and -0, or all where the scale is zero
            errors = [(grid.points(each) - V[start:stop]).abs() for each in (new, old)]
            codes[start:stop] = torch.where(errors[0] < errors[1], new.to(torch.uint8), old)
        return self.with_codes(packed, codes)


def with_tensors(packed: PackedWeight, **tensors: Tensor) -> PackedWeight:
    """``packed`` with some other tensors of the same layout."""
    return packed.layout.fill({**packed.tensors, **tensors})
