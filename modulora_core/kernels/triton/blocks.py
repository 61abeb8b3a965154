"""What Triton kernels on a GPU share, first half: blocks of Ŵ, and the decode function that a plugin writes.

A plugin writes one function, and the core's kernels (:mod:`modulora_core.kernels.triton.tiles` and
:mod:`modulora_core.kernels.triton.products`) call it for a block at a time, so that Ŵ exists in registers only::

    @triton.jit
    def decode(weight, row, col, out_features, in_features, OPTIONS: tl.constexpr,
               BLOCK_OUT: tl.constexpr, BLOCK_IN: tl.constexpr):
        codes, scales = weight                                    # the tuple that was given to the launcher
        at, inside = block(row, col, out_features, in_features, BLOCK_OUT, BLOCK_IN)
        q = tl.load(codes + at, mask=inside, other=0)             # [BLOCK_OUT, BLOCK_IN]
        ...
        return w                                                  # fp32 [BLOCK_OUT, BLOCK_IN]

* ``weight``: a tuple of tensors (pointers here) and whole numbers, whatever the format needs.
* ``row``, ``col``: scalars, where the block begins; either may be int64, and a block may reach beyond the weight.
* ``OPTIONS``: any constant of the format, such as a group size or a tuple of them; a kernel is compiled for each value.
* The result: the fp32 values of the reference, bit for bit; **finite outside of the weight**, where products multiply it by zero and
  tiles do not store it. Nothing outside of the tensors may be read.

Where a byte holds codes of columns that are far apart, a launcher is told into how many *parts* of ⌈in / parts⌉ columns the bytes
make a row fall. ``decode`` then gets the number of a part after ``weight``'s own elements, and counts ``col`` from where that part begins.
It is asked for the same columns of all parts in turn, so that the bytes come from memory once.

Kernels are compiled without contraction of a · b + c (``enable_fp_fusion=False``): a decode function rounds where its
reference does. Products say :func:`tl.fma` where they want it.

``TRITON_INTERPRET=1`` in the environment runs all of this on CPU tensors. The interpreter of Triton 3.9 truncates to
bf16 where a GPU rounds, and multiplies bf16 operands of ``tl.dot`` by their bits: :func:`rounded` and :func:`dot` mend it.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from modulora_core.kernels import triton_is_interpreted

INTERPRETED = tl.constexpr(triton_is_interpreted())
"""Whether kernels run in Triton's interpreter: decided when they are decorated, so once a process."""


@triton.jit
def block(  # type: ignore[no-untyped-def]
    row, col, out_features, in_features, BLOCK_OUT: tl.constexpr, BLOCK_IN: tl.constexpr
) -> Any:  # fmt: skip
    """Where the elements of a block are in a row-major ``[out, in]`` matrix, and which of them exist.

    Returns:
        offsets ``[BLOCK_OUT, BLOCK_IN]``, int64 by the row and int32 inside of it, and a mask of that shape.
    """
    rows = row + tl.arange(0, BLOCK_OUT)[:, None]
    columns = col + tl.arange(0, BLOCK_IN)[None, :]
    inside = (rows < out_features) & (columns < in_features)
    return rows.to(tl.int64) * in_features + columns, inside


@triton.jit
def rounded(w, dtype: tl.constexpr) -> Any:  # type: ignore[no-untyped-def]
    """fp32 values in ``dtype``, rounded once, to nearest and halves to even."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = w.to(tl.uint32, bitcast=True)
        up = bits + 0x7FFF + ((bits >> 16) & 1)
        bits = tl.where(w == w, up, bits | 0x400000)  # a NaN stays one
        return (bits >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return w.to(dtype)


@triton.jit
def dot(a, b, total) -> Any:  # type: ignore[no-untyped-def]
    """``total + a b`` with fp32 sums, of operands in one dtype; fp32 ones are multiplied as fp32, not as tf32."""
    if INTERPRETED:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, total, input_precision="ieee")


@triton.jit
def interleaved(even, odd) -> Any:  # type: ignore[no-untyped-def]
    """``[rows, n]`` twice to ``[rows, 2 n]``: the columns of ``even`` and of ``odd`` by turns. In registers, a thread for itself."""
    return tl.reshape(tl.join(even, odd), even.shape[0], 2 * even.shape[1])


@triton.jit
def times_group(w, scale) -> Any:  # type: ignore[no-untyped-def]
    """``w`` ``[rows, groups · G]`` times ``scale`` ``[rows, groups]``: G consecutive columns share one, which is loaded once."""
    rows: tl.constexpr = scale.shape[0]
    groups: tl.constexpr = scale.shape[1]
    G: tl.constexpr = w.shape[1] // groups
    scaled = tl.reshape(w, rows, groups, G) * scale[:, :, None]
    return tl.reshape(scaled, rows, groups * G)
