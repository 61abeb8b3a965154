"""Multiply by a packed weight of which one tile at a time is dense.

    forward      Y = X Ŵᵀ      for each tile of rows [a, b):   Y[:, a:b]  = X · Ŵ[a:b]ᵀ
    transposed   X = Y Ŵ       for each tile of rows [a, b):   X         += Y[:, a:b] · Ŵ[a:b]
    lookup       X = Ŵ[ids]    for each run of ids [a, b):     X[a:b]     = Ŵ[a:b]

A *tile function* gives rows ``[start, stop)`` of a matrix. Nothing here knows a quantizer, so a
plugin whose weight lives in a rotated basis uses the same loops.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from modulora_core import dense_products
from modulora_core.arguments import checked
from modulora_core.errors import OptionError, ShapeError

TileFunction = Callable[[int, int, torch.dtype], Tensor]
"""``tile(start, stop, dtype)`` gives rows ``[start, stop)``, a ``[stop - start, in]`` tensor."""

CPU_TILE_BYTES = 16 * 2**20
"""2048 rows of 2048 fp32 values, half of a common last-level cache. Smaller tiles cost more
synchronisation between the threads that decode and the threads that multiply."""

ACCELERATOR_TILE_BYTES = 128 * 2**20
"""Enough for a bf16 weight of an 8 B model, so that its transposed product has no partial sums."""

_budgets: list[int] = []
"""The open blocks of :func:`tile_budget`, the innermost last. They hold for the process and not for
a thread, because autograd runs the backward of a GPU in threads of its own."""


def tile_bytes(device: torch.device) -> int:
    """The budget in bytes for one dense tile.

    The first of: an open :func:`tile_budget`, ``MODULORA_TILE_BYTES``, the device's default.
    """
    if _budgets:
        return _budgets[-1]
    text = os.environ.get("MODULORA_TILE_BYTES")
    if text is None:
        return CPU_TILE_BYTES if device.type == "cpu" else ACCELERATOR_TILE_BYTES
    if not text.isdigit() or int(text) == 0:
        raise OptionError(f"MODULORA_TILE_BYTES: expected a positive number of bytes, got {text!r}")
    return int(text)


@checked
@contextmanager
def tile_budget(nbytes: int) -> Iterator[None]:
    """Within this block a tile takes at most ``nbytes`` bytes, and never less than one row.

    One thread at a time opens such a block. A backward uses the budget that is open when it runs.

    Raises OptionError: ``nbytes`` is not positive.
    """
    if nbytes <= 0:
        raise OptionError(f"tile budget: expected a positive number of bytes, got {nbytes}")
    _budgets.append(nbytes)
    try:
        yield
    finally:
        _budgets.pop()


def tile_ranges(rows: int, row_bytes: int, budget: int) -> Iterator[tuple[int, int]]:
    """Cut ``rows`` into nearly equal ranges of at most ``budget`` bytes, and at least one row."""
    if rows == 0:
        return
    most = max(1, budget // max(1, row_bytes))
    step = -(-rows // -(-rows // most))
    for start in range(0, rows, step):
        yield start, min(start + step, rows)


def tiled_matmul(
    x: Tensor, tile: TileFunction, shape: tuple[int, int], transpose: bool = False
) -> Tensor:
    """Multiply ``x`` by a matrix that exists a tile at a time.

    Args:
        x: ``[..., in]``, or ``[..., out]`` when ``transpose``; any float dtype.
        tile: gives rows ``[start, stop)`` of Ŵ.
        shape: ``(out, in)`` of Ŵ.
        transpose: ``x Ŵ`` instead of ``x Ŵᵀ``.

    Returns:
        ``[..., out]``, or ``[..., in]`` when ``transpose``, in ``x``'s dtype, without a gradient.

    Raises ShapeError: the last dimension of ``x`` does not fit.
    """
    given, wanted = shape if transpose else reversed(shape)
    if x.dim() == 0 or x.shape[-1] != given:
        raise ShapeError(f"matmul of a {list(shape)} weight: expected x of shape [..., {given}], "
                         f"got {list(x.shape)}")  # fmt: skip
    rows = math.prod(x.shape[:-1])
    if rows == 0:  # the chunked loss asks a head for no rows, to learn its dtype
        return x.new_empty(*x.shape[:-1], wanted)
    with torch.no_grad(), dense_products.without_autocast(x.device):
        multiply = _transposed if transpose else _forward
        return multiply(x.reshape(rows, given), tile, shape).reshape(*x.shape[:-1], wanted)


# The loops give a tile no name, so that it is freed before the next tile is decoded.


def _forward(x: Tensor, tile: TileFunction, shape: tuple[int, int]) -> Tensor:
    dtype, ranges = _tiles(x, shape)
    operand = x.to(dtype)
    if len(ranges) == 1:
        return dense_products.product(operand, tile(*ranges[0], dtype).t()).to(x.dtype)
    y = x.new_empty(len(x), shape[0])
    for start, stop in ranges:
        dense_products.put_product(y[:, start:stop], operand, tile(start, stop, dtype).t())
    return y


def _transposed(y: Tensor, tile: TileFunction, shape: tuple[int, int]) -> Tensor:
    dtype, ranges = _tiles(y, shape)
    if len(ranges) == 1:
        return dense_products.product(y.to(dtype), tile(*ranges[0], dtype)).to(y.dtype)
    # each tile's product is in dtype; they are summed in fp32 or wider
    x = y.new_zeros(len(y), shape[1], dtype=torch.promote_types(dtype, torch.float32))
    for start, stop in ranges:
        dense_products.add_product(x, y[:, start:stop].to(dtype), tile(start, stop, dtype))
    return x.to(y.dtype)


def _tiles(x: Tensor, shape: tuple[int, int]) -> tuple[torch.dtype, list[tuple[int, int]]]:
    """The dtype in which ``x`` is multiplied, and the ranges of rows of the tiles."""
    dtype = dense_products.compute_dtype(x.dtype, x.device)
    return dtype, list(tile_ranges(shape[0], shape[1] * dtype.itemsize, tile_bytes(x.device)))


def looked_up(
    ids: Tensor, tile: TileFunction, shape: tuple[int, int], dtype: torch.dtype
) -> Tensor:
    """Rows ``ids`` of a matrix that exists a tile at a time, as an embedding needs them.

    Each row is decoded once, and neighbouring rows are decoded together.

    Args:
        ids: any shape, an integer dtype.
        tile: gives rows ``[start, stop)`` of the matrix.
        shape: ``(out, in)`` of the matrix.
        dtype: the dtype of the result.

    Returns:
        ``[*ids.shape, in]``, on the device of ``ids``, without a gradient.

    Raises IndexError: an id below 0, or beyond the last row.
    """
    rows, columns = shape
    with torch.no_grad():
        distinct, places = ids.unique(return_inverse=True)
        wanted = distinct.tolist()
        if wanted and not 0 <= wanted[0] <= wanted[-1] < rows:
            raise IndexError(f"ids of rows of a {list(shape)} table: expected 0 to {rows - 1}, "
                             f"got {wanted[0]} to {wanted[-1]}")  # fmt: skip
        most = max(1, tile_bytes(ids.device) // max(1, columns * dtype.itemsize))
        found = torch.empty(len(wanted), columns, dtype=dtype, device=ids.device)
        for first, last in _runs(wanted, most):
            found[first:last] = tile(wanted[first], wanted[last - 1] + 1, dtype)
        return found[places]


def _runs(numbers: Sequence[int], longest: int) -> Iterator[tuple[int, int]]:
    """Cut ascending ``numbers`` into runs ``[first, last)`` of at most ``longest`` neighbours."""
    first = 0
    for i in range(1, len(numbers) + 1):
        if i == len(numbers) or numbers[i] > numbers[i - 1] + 1 or i - first == longest:
            yield first, i
            first = i
