"""The tile budget and the tiled product: the only place where a dense weight exists, a tile at a time.

    forward      Y = X Ŵᵀ      for each tile of rows [a, b):   Y[:, a:b]  = X · Ŵ[a:b]ᵀ
    transposed   X = Y Ŵ       for each tile of rows [a, b):   X         += Y[:, a:b] · Ŵ[a:b]
    looked up    X = Ŵ[ids]    for each run of ids [a, b):      their rows of X = rows of Ŵ[a:b]

Nothing here knows a quantizer: a *tile function* gives rows ``[start, stop)`` of some matrix in a dtype. That
is what lets a plugin whose weight lives in a rotated basis use the same loop.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache

import torch
from torch import Tensor

from modulora_core.devices.dense_products import add_product, bound_caches, product, put_product
from modulora_core.errors import OptionError, ShapeError

TileFunction = Callable[[int, int, torch.dtype], Tensor]
"""``tile(start, stop, dtype)`` gives rows ``[start, stop)``: a ``[stop - start, in]`` tensor of that dtype."""

CPU_TILE_BYTES = 16 * 2**20
"""2048 rows of 2048 fp32 values: half of a common last-level cache. Between two tiles the threads of the decoding kernel and
those of the matrix product hand over to each other, which costs milliseconds on a busy machine; with free cores the size hardly matters
(docs/performance-findings.md has the measurement)."""

ACCELERATOR_TILE_BYTES = 64 * 2**20
"""On a GPU the tile lives in device memory anyway; this is large enough to fill it with work."""

ACCELERATOR_BRIDGE_BYTES = 4 * 2**20
"""Between two rows that are looked up others are decoded too where they take no more than this: a GPU writes it in microseconds, about as
long as it takes to ask for one more tile. An estimate, not measured."""

_budgets: list[int] = []
"""Those of the blocks of :func:`tile_budget` that are open, the innermost last. Of the process, not of a thread: on a GPU autograd runs a
backward in threads of its own."""


def tile_bytes(device: torch.device) -> int:
    """The budget in bytes for one dense tile on ``device``.

    In order: :func:`tile_budget`, the environment's ``MODULORA_TILE_BYTES``, the default for the device.
    """
    if _budgets:
        return _budgets[-1]
    if "MODULORA_TILE_BYTES" in os.environ:
        return _parse_tile_bytes(os.environ["MODULORA_TILE_BYTES"])
    return CPU_TILE_BYTES if device.type == "cpu" else ACCELERATOR_TILE_BYTES


def _parse_tile_bytes(text: str) -> int:
    if not text.isdigit() or int(text) == 0:
        raise OptionError(
            f"MODULORA_TILE_BYTES: expected a positive whole number of bytes, got {text!r}"
        )
    return int(text)


@contextmanager
def tile_budget(nbytes: int) -> Iterator[None]:
    """Within this block a tile takes at most ``nbytes`` bytes (and never less than one row).

    It holds for the whole process: one thread at a time opens such a block. The backward of a forward made inside runs in the budget
    that holds when *it* runs.
    """
    if nbytes <= 0:
        raise OptionError(f"tile budget: expected a positive number of bytes, got {nbytes}")
    _budgets.append(nbytes)
    try:
        yield
    finally:
        _budgets.pop()


def tile_ranges(rows: int, row_bytes: int, budget: int) -> Iterator[tuple[int, int]]:
    """Cut ``rows`` into ranges of (nearly) equal length, each at most ``budget`` bytes and at least one row."""
    if rows == 0:
        return
    most = max(1, budget // max(1, row_bytes))
    tiles = -(-rows // most)
    step = -(-rows // tiles)
    for start in range(0, rows, step):
        yield start, min(start + step, rows)


@cache
def has_bfloat16_units() -> bool:
    """Whether this CPU multiplies bf16 numbers itself, by AVX-512's or AMX's instructions, and torch uses these, by oneDNN.

    oneDNN may have been told not to (``ONEDNN_MAX_CPU_ISA``): then a bf16 product takes hundreds of times as long.
    """
    capabilities = (torch.cpu._is_avx512_bf16_supported, torch.cpu._is_amx_tile_supported)
    has = any(supported() for supported in capabilities)
    has = (
        has
        and torch.backends.mkldnn.is_available()
        and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )
    if has:
        bound_caches()
    return has


@cache
def has_bfloat16_tile_units() -> bool:
    """Whether it does so by AMX, whose instructions multiply whole matrices."""
    return has_bfloat16_units() and torch.cpu._is_amx_tile_supported()


def compute_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype in which tiles are multiplied by inputs of ``dtype``: theirs, but for 16 bits on a CPU without units for them.

    There a bf16 product with a transposed operand is far slower than an fp32 one; with units it takes less than half as long
    (docs/performance-findings.md). For fp16 no CPU is known to be worth it.
    """
    on_cpu = device.type == "cpu"
    if on_cpu and (
        dtype == torch.float16 or (dtype == torch.bfloat16 and not has_bfloat16_units())
    ):
        return torch.float32
    return dtype


def tiled_matmul(
    x: Tensor,
    tile: TileFunction,
    shape: tuple[int, int],
    transpose: bool = False,
    *,
    budget: int | None = None,
) -> Tensor:
    """Multiply ``x`` by a matrix that only exists a tile at a time.

    Args:
        x: ``[..., in]``, or ``[..., out]`` when ``transpose``; any float dtype, any number of leading dimensions.
        tile: gives rows ``[start, stop)`` of Ŵ.
        shape: ``(out, in)`` of Ŵ.
        transpose: ``x Ŵ`` instead of ``x Ŵᵀ``.
        budget: bytes for one dense tile; by default :func:`tile_bytes` of ``x``'s device.

    Returns:
        ``[..., out]``, or ``[..., in]`` when ``transpose``, in ``x``'s dtype. Not differentiable: the core's
        autograd function is what calls it.

    Raises:
        ShapeError: the last dimension of ``x`` isn't the one that the product needs.
    """
    out_features, in_features = shape
    expected = out_features if transpose else in_features
    if x.dim() == 0 or x.shape[-1] != expected:
        raise ShapeError(f"matmul of a [{out_features}, {in_features}] weight: expected x of shape "
                         f"[..., {expected}], got {list(x.shape)}")  # fmt: skip
    if (
        x.shape[:-1].numel() == 0
    ):  # no tile for it: a model asks its head for no rows where its logits are deferred
        return x.new_empty(*x.shape[:-1], in_features if transpose else out_features)
    with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
        flat = x.reshape(
            math.prod(x.shape[:-1]), expected
        )  # [n, in] or [n, out]; -1 is ambiguous when expected is 0
        multiply = _transposed if transpose else _forward
        y = multiply(flat, tile, shape, budget or tile_bytes(x.device))
        return y.reshape(*x.shape[:-1], y.shape[-1])


# A tile has no name in the loops that ask for it: it would live until the next one is there.


def _forward(x: Tensor, tile: TileFunction, shape: tuple[int, int], budget: int) -> Tensor:
    out_features, in_features = shape
    dtype = compute_dtype(x.dtype, x.device)
    operand = x.to(dtype)
    ranges = list(tile_ranges(out_features, in_features * dtype.itemsize, budget))
    if len(ranges) == 1:
        return product(operand, tile(*ranges[0], dtype).t()).to(x.dtype)
    y = x.new_empty(x.shape[0], out_features)
    for start, stop in ranges:
        put_product(y[:, start:stop], operand, tile(start, stop, dtype).t())
    return y


def _transposed(y: Tensor, tile: TileFunction, shape: tuple[int, int], budget: int) -> Tensor:
    out_features, in_features = shape
    dtype = compute_dtype(y.dtype, y.device)
    ranges = list(tile_ranges(out_features, in_features * dtype.itemsize, budget))
    if len(ranges) == 1:
        return product(y.to(dtype), tile(*ranges[0], dtype)).to(y.dtype)
    # summed in fp32 or wider, and rounded once
    x = y.new_zeros(y.shape[0], in_features, dtype=torch.promote_types(dtype, torch.float32))
    for start, stop in ranges:
        add_product(x, y[:, start:stop].to(dtype), tile(start, stop, dtype))
    return x.to(y.dtype)


def looked_up(
    ids: Tensor,
    tile: TileFunction,
    shape: tuple[int, int],
    dtype: torch.dtype,
    *,
    budget: int | None = None,
) -> Tensor:
    """Rows of a matrix that only exists a tile at a time, by their numbers: what an embedding does.

    Each row is decoded once, however often it is asked for; rows that stand side by side are decoded together, and on a GPU those that
    stand near each other, with what is between them (:data:`ACCELERATOR_BRIDGE_BYTES`).

    Args:
        ids: any shape, an integer dtype.
        tile: gives rows ``[start, stop)`` of the matrix.
        shape: ``(out, in)`` of it.
        budget: bytes for one dense tile, as for :func:`tiled_matmul`.
        dtype: of the result.

    Returns:
        ``[*ids.shape, in]``, on the device of ``ids``. Not differentiable.

    Raises:
        IndexError: an id below 0, or beyond the last row.
    """
    rows, in_features = shape
    with torch.no_grad():
        distinct, places = ids.unique(return_inverse=True)
        wanted = distinct.tolist()
        if wanted and not 0 <= wanted[0] <= wanted[-1] < rows:
            raise IndexError(f"ids of rows of a [{rows}, {in_features}] table: expected 0 to {rows - 1}, got "
                             f"{wanted[0]} to {wanted[-1]}")  # fmt: skip
        found = torch.empty(len(wanted), in_features, dtype=dtype, device=ids.device)
        most, bridge = (
            nbytes // max(1, in_features * dtype.itemsize)
            for nbytes in (budget or tile_bytes(ids.device), _bridge_bytes(ids.device))
        )
        for first, last in _runs(wanted, most, bridge):
            start, stop = wanted[first], wanted[last - 1] + 1
            found[first:last] = _picked(tile(start, stop, dtype), distinct[first:last], start)
        return found[places]


def _picked(rows: Tensor, ids: Tensor, start: int) -> Tensor:
    """Those of a tile, which begins at row ``start``, that are asked for; ``ids`` are ascending and distinct."""
    return rows if len(rows) == len(ids) else rows[ids - start]


def _bridge_bytes(device: torch.device) -> int:
    return 0 if device.type == "cpu" else ACCELERATOR_BRIDGE_BYTES


def _runs(numbers: Sequence[int], longest: int, bridge: int) -> Iterator[tuple[int, int]]:
    """Ascending ``numbers`` in parts ``[first, last)``: no gap between two is longer than ``bridge``, and from the first to the last there
    are at most ``longest``, or it is one.
    """
    first = 0
    for i in range(1, len(numbers) + 1):
        ends = i == len(numbers) or numbers[i] - numbers[i - 1] - 1 > bridge
        if ends or numbers[i] - numbers[first] >= longest:
            yield first, i
            first = i
