"""What a quantizer's work takes beside its results: measured, since a plugin may do it in any way.

A small weight of the layer's proportions is packed and multiplied for real, and torch's allocations are counted. What such work
allocates is proportional to one of three: rows · width (copies of the input in another dtype or basis), the tile, or, in packing, the
weight. What compiled kernels allocate for themselves isn't seen.
"""

from __future__ import annotations

import gc
from dataclasses import dataclass
from functools import lru_cache

import torch

from modulora_core.devices.memory import Allocations
from modulora_core.errors import ShapeError
from modulora_core.kernels.cpu.block_choice import most_rows
from modulora_core.spec import Calibration, PackedWeight, Quantizer
from modulora_core.tiles import compute_dtype, tile_budget, tile_ranges

WIDTH = 256
"""The longer side of the small weight."""

ROWS = 640
"""Rows of the small product where the real one has as many or more: beyond those that plugins multiply without a tile."""


@dataclass(frozen=True, slots=True)
class _Product:
    """Bytes of a product's workspace: for each row and each column of the weight's longer side, and for each byte of a dense tile, whose
    values have ``width`` bytes.
    """

    per_entry: float
    per_tile_byte: float
    width: int

    def nbytes(self, rows: int, shape: tuple[int, int], tile_bytes: int) -> int:
        return int(
            self.per_entry * rows * max(shape)
            + self.per_tile_byte * _tile(shape, tile_bytes, self.width)
        )


def product_workspace(
    quantizer: Quantizer,
    shape: tuple[int, int],
    dtype: torch.dtype,
    rows: int,
    tile_bytes: int,
    transpose: bool,
) -> int:
    """Bytes that a product takes beside its result.

    Args:
        quantizer: whose product it is.
        shape: (out, in) of the weight.
        dtype: of x.
        rows: of x, all leading dimensions together.
        tile_bytes: the tile budget.
        transpose: x Ŵ instead of x Ŵᵀ.
    """
    if rows == 0:
        return 0
    small = _small_shape(quantizer, shape)
    options = quantizer.options.model_dump_json()
    key = (type(quantizer), options, small, dtype)
    if rows < ROWS:
        # as the real weight has no tile for so many rows, the small one must not have one either
        few = min(rows, most_rows(small)) if rows <= most_rows(shape) else rows
        per_entry = _without_tile(*key, few, transpose)
        if per_entry is not None:
            return int(per_entry * rows * max(shape))
    shrunk, width = max(small) / max(shape), _width(dtype)
    few = max(ROWS, round(rows * shrunk))
    # the small tile is to the small input what the real one is to the real one, as far as it can be
    wanted = _tile(shape, tile_bytes, width) * shrunk * few / rows
    whole = small[0] * small[1] * width
    in_one_tile = _tile(shape, tile_bytes, width) == shape[0] * shape[1] * width
    budget = whole if in_one_tile else int(min(wanted, whole // 4))
    return _many_rows(*key, few, budget, transpose).nbytes(rows, shape, tile_bytes)


@lru_cache(maxsize=256)
def _without_tile(
    cls: type[Quantizer],
    options: str,
    shape: tuple[int, int],
    dtype: torch.dtype,
    rows: int,
    transpose: bool,
) -> float | None:
    """Bytes for each row and each column of the longer side, of a product that has a kernel of its own; None where it takes a tile.

    Two budgets tell. What it takes by tiles isn't told by them: with several tiles there are results of each, too.
    """
    width = _width(dtype)
    budgets = [shape[0] * shape[1] * width // part for part in (8, 4)]
    first, second = (
        _peak_of_product(cls, options, shape, dtype, rows, transpose, budget) for budget in budgets
    )
    small, large = (_tile(shape, budget, width) for budget in budgets)
    if second - first > (large - small) / 2:
        return None
    return first / (rows * max(shape))


@lru_cache(maxsize=256)
def _many_rows(
    cls: type[Quantizer],
    options: str,
    shape: tuple[int, int],
    dtype: torch.dtype,
    rows: int,
    budget: int,
    transpose: bool,
) -> _Product:
    """Of a product by tiles: two numbers of rows tell the tile from the rest."""
    first, second = (
        _peak_of_product(cls, options, shape, dtype, n, transpose, budget)
        for n in (rows, rows + rows // 8)
    )
    per_row = max(0.0, (second - first) / (rows // 8))
    width = _width(dtype)
    return _Product(
        per_row / max(shape), max(0.0, first - per_row * rows) / _tile(shape, budget, width), width
    )


def _peak_of_product(
    cls: type[Quantizer],
    options: str,
    shape: tuple[int, int],
    dtype: torch.dtype,
    rows: int,
    transpose: bool,
    budget: int,
) -> int:
    """Bytes beside the result."""
    quantizer, packed = cls(cls.Options.model_validate_json(options)), _packed(cls, options, shape)
    x = torch.zeros(rows, shape[0 if transpose else 1], dtype=dtype)
    with torch.no_grad(), tile_budget(max(1, budget)):
        quantizer.matmul(x, packed, transpose)  # what is made once is there then
        with Allocations([x, *packed.tensors.values()]) as allocations:
            y = quantizer.matmul(x, packed, transpose)
    return int(allocations.peak) - y.numel() * y.element_size()


def packing_workspace(quantizer: Quantizer, shape: tuple[int, int]) -> int:
    """Bytes that packing a weight of this shape takes, beside the weight and its H, with the packed weight itself."""
    key = (type(quantizer), quantizer.options.model_dump_json())
    small = _small_shape(quantizer, shape)
    if quantizer.spec.calibration == "none" and small != shape:
        # rows are packed alike, and what a row takes has a part that doesn't grow with its length: a scale
        first, second = (
            _peak_of_packing(*key, (small[0], width)) for width in (small[1], 2 * small[1])
        )
        per_column = (second - first) / small[1]
        return int((first + per_column * (shape[1] - small[1])) * shape[0] / small[0])
    return int(_peak_of_packing(*key, small) * (shape[0] * shape[1]) / (small[0] * small[1]))


@lru_cache(maxsize=256)
def _peak_of_packing(cls: type[Quantizer], options: str, shape: tuple[int, int]) -> int:
    quantizer = cls(cls.Options.model_validate_json(options))
    weight, calibration = _weight(shape), _calibration(quantizer, shape)
    quantizer.pack(weight, calibration)
    gc.collect()
    before = [weight] if calibration is None else [weight, calibration.hessian]
    with Allocations(before) as allocations:
        quantizer.pack(weight, calibration)
    return int(allocations.peak)


@lru_cache(maxsize=64)
def _packed(cls: type[Quantizer], options: str, shape: tuple[int, int]) -> PackedWeight:
    quantizer = cls(cls.Options.model_validate_json(options))
    return quantizer.pack(_weight(shape), _calibration(quantizer, shape))


def _weight(shape: tuple[int, int]) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def _calibration(quantizer: Quantizer, shape: tuple[int, int]) -> Calibration | None:
    return None if quantizer.spec.calibration == "none" else Calibration(torch.eye(shape[1]), 1)


def _width(dtype: torch.dtype) -> int:
    """Bytes of a tile's value for inputs of ``dtype``, on the CPU, where products are measured."""
    return compute_dtype(dtype, torch.device("cpu")).itemsize


def _tile(shape: tuple[int, int], budget: int, width: int) -> int:
    """Bytes of the largest tile within ``budget``."""
    start, stop = next(tile_ranges(shape[0], shape[1] * width, budget))
    return (stop - start) * shape[1] * width


def _small_shape(quantizer: Quantizer, shape: tuple[int, int]) -> tuple[int, int]:
    """The proportions of ``shape`` with a longer side of :data:`WIDTH`, in steps that every quantizer here takes; else ``shape`` itself."""
    longest = max(shape)
    if longest <= WIDTH:
        return shape
    out_step, in_step = quantizer.spec.out_multiple, quantizer.spec.in_multiple
    small = (
        _stepped(shape[0] * WIDTH / longest, out_step),
        _stepped(shape[1] * WIDTH / longest, in_step),
    )
    try:
        quantizer.check_shape(small)
    except ShapeError:
        return shape
    return small


def _stepped(size: float, multiple: int) -> int:
    step = multiple * -(-16 // multiple)
    return max(1, round(size / step)) * step
