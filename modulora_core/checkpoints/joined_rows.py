"""Join packed weights by their rows into one, such as gates and ups of two types.

    Ŵ = [Ŵ₁; Ŵ₂]      x Ŵᵀ = [x Ŵ₁ᵀ, x Ŵ₂ᵀ]      dY Ŵ = dY₁ Ŵ₁ + dY₂ Ŵ₂

The model's code has one matrix, which a file of another tool keeps in parts. Each part has a
quantizer and tensors of its own. Its tensors ``NAME`` become ``part0_NAME``, ``part1_NAME``, ...
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import reduce
from typing import ClassVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from modulora_core.errors import CheckpointError, PluginError
from modulora_core.models.formats import ForeignWeight, Read
from modulora_core.packed import check_rows
from modulora_core.spec import Calibration, PackedLayout, PackedWeight, Quantizer, QuantizerSpec

_PARTS = "parts"

_CACHE: WeakKeyDictionary[PackedWeight, list[PackedWeight]] = WeakKeyDictionary()
"""The parts of each joined weight."""


class JoinedRows(Quantizer):
    """The quantizer of a joined weight, which files of other tools have; ``pack`` makes none.

    Args:
        parts: the quantizer of each part, from the first rows to the last.
    """

    spec: ClassVar[QuantizerSpec] = QuantizerSpec(
        name="joined-rows",
        summary="rows of several packed weights",
        location="modulora_core.checkpoints.joined_rows:JoinedRows",
        protocol=2,
        bits=(32,),  # nothing is packed by it
    )

    def __init__(self, parts: Sequence[Quantizer]) -> None:
        super().__init__()
        self.parts = tuple(parts)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, JoinedRows) and self.parts == other.parts

    def __hash__(self) -> int:
        return hash(self.parts)

    def pack(self, weight: Tensor, calibration: Calibration | None = None) -> PackedWeight:
        """Always raises PluginError."""
        del weight, calibration
        raise PluginError(f"{self.spec.name}: expected packed weights to join, got a dense one")

    def check_format(self, packed: PackedWeight | PackedLayout) -> None:
        super().check_format(packed)
        layout = packed.layout if isinstance(packed, PackedWeight) else packed
        layouts = layouts_of_parts(layout)
        if len(layouts) != len(self.parts) or joined_layout(layouts) != layout:
            raise CheckpointError(
                f"packed weight of {self.spec.name}: expected the tensors of {len(self.parts)} "
                f"parts, got {layout}"
            )
        for quantizer, part in zip(self.parts, layouts, strict=True):
            quantizer.check_format(part)

    def check_values(self, packed: PackedWeight, subject: str) -> None:
        for quantizer, part, _ in self._parts_of(packed):
            quantizer.check_values(part, subject)

    def dequantize_tile(
        self, packed: PackedWeight, rows: tuple[int, int], dtype: torch.dtype
    ) -> Tensor:
        check_rows(packed, rows)
        tiles: list[Tensor] = []
        for quantizer, part, first in self._parts_of(packed):
            start, stop = (min(max(row - first, 0), part.shape[0]) for row in rows)
            if start < stop or not tiles:
                tiles.append(quantizer.dequantize_tile(part, (start, stop), dtype))
        return torch.cat(tiles)

    def matmul(self, x: Tensor, packed: PackedWeight, transpose: bool = False) -> Tensor:
        if not transpose:
            products = [q.matmul(x, part) for q, part, _ in self._parts_of(packed)]
            return torch.cat(products, dim=-1)
        # summed in x's dtype, to which each part's product is rounded
        products = [
            q.matmul(x[..., first : first + part.shape[0]].contiguous(), part, transpose=True)
            for q, part, first in self._parts_of(packed)
        ]
        return reduce(torch.add, products)

    def _parts_of(self, packed: PackedWeight) -> Iterator[tuple[Quantizer, PackedWeight, int]]:
        """The quantizer, the packed weight and the first row of each part."""
        parts = _CACHE.get(packed)
        if parts is None:
            parts = _CACHE[packed] = [
                layout.fill({n: packed.tensors[f"part{i}_{n}"] for n in layout.tensors})
                for i, layout in enumerate(layouts_of_parts(packed.layout))
            ]
        first = 0
        for quantizer, part in zip(self.parts, parts, strict=True):
            yield quantizer, part, first
            first += part.shape[0]


def joined_layout(parts: Sequence[PackedLayout]) -> PackedLayout:
    """The layout of parts as one weight. Raises CheckpointError: they have other columns."""
    columns = {part.shape[1] for part in parts}
    if len(columns) != 1:
        raise CheckpointError(f"parts of a weight: expected one in_features, got {sorted(columns)}")
    shape = sum(part.shape[0] for part in parts), columns.pop()
    tensors = {f"part{i}_{n}": t for i, part in enumerate(parts) for n, t in part.tensors.items()}
    metadata = {_PARTS: [part.to_json() for part in parts]}
    return PackedLayout(JoinedRows.spec.name, JoinedRows.format, shape, tensors, metadata)


def layouts_of_parts(layout: PackedLayout) -> list[PackedLayout]:
    """The layouts of the parts, or the weight's own if it isn't joined. Raises CheckpointError."""
    if layout.quantizer != JoinedRows.spec.name:
        return [layout]
    parts = layout.metadata.get(_PARTS)
    if not isinstance(parts, list) or not parts:
        raise CheckpointError(
            f"{JoinedRows.spec.name}: expected a list of parts, got {parts!r:.80}"
        )
    return [PackedLayout.from_json(part) for part in parts]


def join(parts: Sequence[ForeignWeight]) -> ForeignWeight:
    """Weights of a foreign model as one, by their rows; stacks of experts matrix by matrix.

    Raises CheckpointError: they have other columns.
    """
    layout = joined_layout([part.layout for part in parts])

    def unpack(read: Read) -> PackedWeight:
        tensors = (part.unpack(read).tensors for part in parts)
        return layout.fill({f"part{i}_{n}": t for i, p in enumerate(tensors) for n, t in p.items()})

    names = tuple(name for part in parts for name in part.tensors)
    quantizer = JoinedRows([part.quantizer for part in parts])
    return ForeignWeight(names, quantizer, layout, unpack, experts=parts[0].experts)
