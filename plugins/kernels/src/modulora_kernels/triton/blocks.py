"""Blocks of Ŵ in Triton, and the decode function that a plugin writes.

The toolkit's kernels (:mod:`modulora_kernels.triton.tiles`,
:mod:`modulora_kernels.triton.products`) call it block by block. Ŵ exists in registers only::

    @triton.jit
    def decode(weight, row, col, out_features, in_features, OPTIONS: tl.constexpr,
               BLOCK_OUT: tl.constexpr, BLOCK_IN: tl.constexpr):
        codes, scales = weight                           # the tuple that the launcher was given
        at, inside = block(row, col, out_features, in_features, BLOCK_OUT, BLOCK_IN)
        q = tl.load(codes + at, mask=inside, other=0)    # [BLOCK_OUT, BLOCK_IN]
        ...
        return w                                         # fp32 [BLOCK_OUT, BLOCK_IN]

* ``weight``: a tuple of tensors (pointers here) and whole numbers.
* ``row``, ``col``: scalars, the first element of the block, int32 or int64. A block may reach
  beyond the weight.
* ``OPTIONS``: a constant of the format, such as a group size; a kernel is compiled for each value.
* The result: the fp32 values of the reference, bit for bit. Outside of the weight they are finite:
  products multiply them by zero. Nothing outside of the tensors may be read.

A format may store codes of columns that are far apart in one byte. Its rows fall into *parts* of
⌈in / parts⌉ columns. ``decode`` then gets the number of a part after ``weight``'s own elements, and
counts ``col`` from the beginning of that part. It decodes the same columns of all parts in turn, so
that each byte is read from memory once.

Kernels are compiled without contraction of a · b + c (``enable_fp_fusion=False``), so that a decode
function rounds as its reference does. Products call :func:`tl.fma`.

``TRITON_INTERPRET=1`` runs all of this on CPU tensors. Triton 3.9's interpreter truncates to bf16
and multiplies bf16 operands of ``tl.dot`` by their bits; :func:`rounded` and :func:`dot` mend it.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from modulora_kernels import triton_is_interpreted

INTERPRETED = tl.constexpr(triton_is_interpreted())
"""Whether kernels run in Triton's interpreter, decided once a process."""


@triton.jit
def block(  # type: ignore[no-untyped-def]
    row, col, out_features, in_features, BLOCK_OUT: tl.constexpr, BLOCK_IN: tl.constexpr
) -> Any:  # fmt: skip
    """Offsets of a block's elements in a row-major ``[out, in]`` matrix, and their mask.

    Returns:
        offsets, int64, and the mask, both ``[BLOCK_OUT, BLOCK_IN]``.
    """
    rows = row + tl.arange(0, BLOCK_OUT)[:, None]
    columns = col + tl.arange(0, BLOCK_IN)[None, :]
    inside = (rows < out_features) & (columns < in_features)
    return rows.to(tl.int64) * in_features + columns, inside


@triton.jit
def ceil_div(n, size) -> Any:  # type: ignore[no-untyped-def]
    """⌈n / size⌉ of n ≥ 1. ``tl.cdiv`` adds first, which wraps for an n just below 2³¹."""
    return (n - 1) // size + 1


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
    """``total + a b`` with fp32 sums, of operands in one dtype; fp32 is not rounded to tf32."""
    if INTERPRETED:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, total, input_precision="ieee")


@triton.jit
def interleaved(even, odd) -> Any:  # type: ignore[no-untyped-def]
    """The columns of ``even`` and ``odd``, both ``[rows, n]``, in turn: ``[rows, 2 n]``."""
    return tl.reshape(tl.join(even, odd), even.shape[0], 2 * even.shape[1])


@triton.jit
def spread(values, RUN: tl.constexpr) -> Any:  # type: ignore[no-untyped-def]
    """``[rows, n]`` to ``[rows, n · RUN]``: each value RUN times."""
    rows: tl.constexpr = values.shape[0]
    n: tl.constexpr = values.shape[1]
    return tl.reshape(tl.broadcast_to(values[:, :, None], rows, n, RUN), rows, n * RUN)


@triton.jit
def times_group(w, scale) -> Any:  # type: ignore[no-untyped-def]
    """``w`` ``[rows, groups · G]`` times ``scale`` ``[rows, groups]``, which is loaded once."""
    rows: tl.constexpr = scale.shape[0]
    groups: tl.constexpr = scale.shape[1]
    G: tl.constexpr = w.shape[1] // groups
    scaled = tl.reshape(w, rows, groups, G) * scale[:, :, None]
    return tl.reshape(scaled, rows, groups * G)
