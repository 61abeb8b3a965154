"""Tiles of Ŵ on a GPU: the one kernel that writes dense weights, around a plugin's decode function.

    moves      the codes once, and the tile once: for b bits a weight,
               b / 8 + 4 bytes a weight in fp32, b / 8 + 2 in bf16 and fp16
    computes   the decode, and one rounding
    floor      those bytes at the rate of a device copy

One program decodes one chunk: BLOCK_OUT rows of BLOCK_IN columns, CHUNK elements together. Nothing
is summed, so the clock may choose the chunk and the warps.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from modulora_kernels.triton.blocks import ceil_div, rounded
from modulora_kernels.triton.launching import Config, launch

LARGEST = 8192
"""Elements of a chunk at most."""

CONFIGS = tuple(
    Config(warps, constants=(("CHUNK", chunk),))
    for chunk, warps in ((2048, 4), (1024, 4), (4096, 4), (4096, 8), (LARGEST, 8))
)
"""8 to 32 elements a thread; which is fastest is found by the clock."""

ALIGNED = 1024
"""The least width of a block, unless the range is narrower. Blocks begin at its multiples, on which
a flat format may rely."""


@triton.jit(do_not_specialize=["row", "rows", "first"])
def tile_kernel(  # type: ignore[no-untyped-def]
    weight, out, row, rows, first, lead, columns, part_columns, out_features, in_features,
    DECODE: tl.constexpr, OPTIONS: tl.constexpr, PARTS: tl.constexpr,
    WIDTH: tl.constexpr, ALIGN: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Write ``Ŵ[row : row + rows, col + lead : col + columns]`` to ``out``, of any float dtype.

    Blocks begin at ``col = first · ALIGN``, so that the compiler sees the alignment.
    """
    BLOCK_IN: tl.constexpr = WIDTH if WIDTH < CHUNK else CHUNK
    BLOCK_OUT: tl.constexpr = CHUNK // BLOCK_IN
    across = ceil_div(part_columns, BLOCK_IN)
    r = (tl.program_id(0) // across).to(tl.int64) * BLOCK_OUT
    c = (tl.program_id(0) % across).to(tl.int64) * BLOCK_IN
    i = r + tl.arange(0, BLOCK_OUT)[:, None]
    j = tl.arange(0, BLOCK_IN)[None, :]
    col = first.to(tl.int64) * ALIGN
    # not unrolled: a part is stored before the next is loaded, now from the L1 cache
    for part in range(PARTS):
        source = weight + (part,) if PARTS > 1 else weight  # noqa: RUF005 - Triton knows no * there
        w = DECODE(
            source, row + r, col + c, out_features, in_features, OPTIONS, BLOCK_OUT, BLOCK_IN
        )
        at = c + part * part_columns
        wanted = (i < rows) & (j + c < part_columns) & (j + at < columns) & (j + at >= lead)
        tl.store(
            out + (at - lead) + i * (columns - lead) + j,
            rounded(w, out.dtype.element_ty),
            mask=wanted,
        )


def write_tile(
    decode: Any,
    weight: tuple[Tensor | int, ...],
    out: Tensor,
    rows: tuple[int, int],
    shape: tuple[int, int],
    options: Hashable = 0,
    *,
    columns: tuple[int, int] | None = None,
    align: int = 16,
    parts: int = 1,
    widest: int = LARGEST,
) -> None:
    """Write rows of Ŵ, or a range of columns of them, to ``out``.

    Pass a flat format, whose codes know no rows, as one row of out · in columns, and its tile as a
    range of columns.

    Args:
        decode: the plugin's function (:mod:`modulora_kernels.triton.blocks`).
        weight: for ``decode``; tensors are contiguous and on ``out``'s device.
        out: contiguous ``[rows, columns]``; fp32, fp16 or bf16.
        rows: the range of rows.
        shape: ``(out, in)`` as ``decode`` counts them.
        options: ``decode``'s constants, hashable.
        columns: the range of columns, by default all.
        align: every block begins at a multiple of it: a power of two up to :data:`ALIGNED`.
        parts: the number of parts of a row; with more than one, all columns are written.
        widest: the most columns of a block: a power of two, at least ``align``.
    """
    begin, end = (0, shape[1]) if columns is None else columns
    count = rows[1] - rows[0]
    if count <= 0 or end <= begin:
        return
    lead = begin % align
    part = -(-(end - begin + lead) // parts)
    width = min(triton.next_power_of_2(max(part, align)), widest)
    first, wide = begin // align, end - begin + lead
    arguments = (weight, out, rows[0], count, first, lead, wide, part, *shape)

    def grid(meta: Mapping[str, Any]) -> tuple[int]:
        block_in = min(width, meta["CHUNK"])
        return (-(-count // (meta["CHUNK"] // block_in)) * -(-part // block_in),)

    constants = {
        "DECODE": decode, "OPTIONS": options, "PARTS": parts, "WIDTH": width, "ALIGN": align,
    }  # fmt: skip
    launch(tile_kernel, grid, arguments, constants, CONFIGS, key=("OPTIONS", "WIDTH"))
