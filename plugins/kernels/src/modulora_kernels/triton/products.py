"""Products of few rows with Ŵ on a GPU, around a plugin's decode function.

    forward      y[n, out] = Σ_in  x[n, in]  Ŵ[out, in]
    transposed   y[n, in]  = Σ_out x[n, out] Ŵ[out, in]

    moves      the codes once, x once for each block of outputs (from L2), y once
    computes   the decode once, and 2 n operations a weight
    floor      the codes' bytes at the rate of memory, while decoding keeps up

A program has a block of the outputs and a *share* of the sum. It decodes a block of Ŵ at a time
into registers and adds to fp32 sums. With one row, each thread multiplies and adds, and the
threads' sums are added once at the end. With more rows, ``tl.dot`` multiplies the block by the
padded rows of x. Shares are added by torch in a fixed order: no atomics, the same bits every time.

More than :data:`MOST_ROWS` rows are multiplied by tiles (:func:`modulora_core.tiles.tiled_matmul`).

The blocks decide the order of a sum, so they follow a rule (:func:`chosen`) and not the clock.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from modulora_kernels.triton.blocks import dot, rounded
from modulora_kernels.triton.launching import Config, launch

MOST_ROWS = 32
"""Rows of x that the kernel takes."""

PROGRAMS = 512
"""Programs of a product of a large weight: about four for each processor of a large GPU.

Fixed, so that the order of a sum is the same on every card."""

ENOUGH_FOR_ONE_ROW = 128
"""Programs from which one row's forward is not cut into shares: adding them would take longer.

An estimate."""

ONE_ROW_COLUMNS = 512
"""Columns of a block of one row's forward, unless a format wants fewer."""

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True, slots=True)
class Cut:
    """How a product is cut.

    Attributes:
        block_out, block_in: the block of Ŵ that a program decodes at a time: powers of two.
        config: warps and stages.
    """

    block_out: int
    block_in: int
    config: Config = field(default=Config())


def chosen(n: int, dtype: torch.dtype, transpose: bool, widest: int = ONE_ROW_COLUMNS) -> Cut:
    """The rule: a function of the number of rows, x's dtype, the direction and the format alone.

    A thread has 16 or 32 weights: loads of 16 bytes, and no spills with as many sums. One row's
    blocks are wide along the rows of Ŵ; transposed less so, as each column is a partial sum.
    """
    if (
        n > 1 and dtype == torch.float32
    ):  # no tensor cores but registers, so less of the sum at a time
        return Cut(32, 64) if transpose else Cut(64, 32)
    if n > 1:
        return Cut(64, 64)
    columns = min(widest, ONE_ROW_COLUMNS // 2 if transpose else ONE_ROW_COLUMNS)
    return Cut(4096 // columns, columns)


def padded(n: int, dtype: torch.dtype) -> int:
    """Rows that the kernel is compiled for: a power of two; in 16 bits 1, 16 or 32."""
    if n == 1 or dtype == torch.float32:
        return 1 << (n - 1).bit_length()
    return 16 if n <= 16 else 32


@triton.jit(
    do_not_specialize=["n", "steps"]
)  # else Triton compiles again for 1, and for multiples of 16
def few_rows_kernel(  # type: ignore[no-untyped-def]
    x, weight, y, n, out_features, in_features, part_columns, steps,
    DECODE: tl.constexpr, OPTIONS: tl.constexpr, PARTS: tl.constexpr, TRANSPOSE: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_OUT: tl.constexpr, BLOCK_IN: tl.constexpr,
):  # fmt: skip
    """``y[s] = x Ŵᵀ``, or ``x Ŵ``, over share s of the sum: so many ``steps``.

    x is ``[n, given]``, y ``[shares, n, wanted]``. If rows fall into PARTS, a program sums over the
    same columns of all parts. Transposed, its columns are of one part, and neighbouring programs
    have the same columns of the others.
    """
    if TRANSPOSE:
        given, wanted, last = out_features, in_features, out_features
    else:
        given, wanted, last = in_features, out_features, part_columns
    STEP: tl.constexpr = BLOCK_OUT if TRANSPOSE else BLOCK_IN
    KEPT: tl.constexpr = BLOCK_IN if TRANSPOSE else BLOCK_OUT
    SUMMED: tl.constexpr = 1 if TRANSPOSE else PARTS
    kept = tl.program_id(0) // (PARTS // SUMMED) * KEPT
    own = tl.program_id(0) % (PARTS // SUMMED)
    begin = tl.program_id(1) * steps
    end = tl.minimum(begin + steps, tl.cdiv(last, STEP))
    i = tl.arange(0, ROWS)
    if ROWS == 1:
        total = tl.zeros((BLOCK_OUT, BLOCK_IN), tl.float32)
    else:
        total = tl.zeros((KEPT, ROWS), tl.float32)
    # one loop over blocks and parts: the next loads are under way; unrolled, parts would spill
    for step in range(begin * SUMMED, end * SUMMED):
        at = step // SUMMED * STEP  # the compiler then knows its divisors
        row, col = (at, kept) if TRANSPOSE else (kept, at)
        part = own if TRANSPOSE else step % SUMMED
        source = weight + (part,) if PARTS > 1 else weight  # noqa: RUF005 - Triton knows no * there
        w = DECODE(source, row, col, out_features, in_features, OPTIONS, BLOCK_OUT, BLOCK_IN)
        k = at + tl.arange(0, STEP)
        there = k < last
        if SUMMED > 1:
            k += part * part_columns
            there = there & (k < given)
        if ROWS == 1:
            v = tl.load(x + k, mask=there, other=0.0).to(tl.float32)
            v = v[:, None] if TRANSPOSE else v[None, :]
            total = tl.fma(w, tl.broadcast_to(v, w.shape), total)
        else:
            mask = (i < n)[None, :] & there[:, None]
            v = tl.load(x + i[None, :] * given + k[:, None], mask=mask, other=0.0)
            a = rounded(w, x.dtype.element_ty)
            total = dot(tl.trans(a) if TRANSPOSE else a, v, total)
    j = kept + tl.arange(0, KEPT)
    here = j < (part_columns if TRANSPOSE else wanted)
    if TRANSPOSE and PARTS > 1:
        j += own * part_columns
        here = here & (j < wanted)
    to = y + tl.program_id(1).to(tl.int64) * n * wanted
    if ROWS == 1:
        sums = tl.sum(total, axis=0 if TRANSPOSE else 1)
        tl.store(to + j, rounded(sums, y.dtype.element_ty), mask=here)
    else:
        mask = (i < n)[None, :] & here[:, None]
        tl.store(
            to + i[None, :] * wanted + j[:, None], rounded(total, y.dtype.element_ty), mask=mask
        )


def few_rows(x: Tensor, features: int, most: int = MOST_ROWS) -> Tensor | None:
    """``x`` for :func:`multiply`, contiguous ``[n, features]``; None to multiply by tiles.

    Tiles are for more than ``most`` rows, for fp64, and for a wrong last dimension, which the tiled
    product refuses.
    """
    if x.dtype not in DTYPES or x.dim() == 0 or x.shape[-1] != features:
        return None
    if x.numel() == 0 or x.numel() > most * features:
        return None
    return x.detach().reshape(-1, features).contiguous()


def multiply(
    decode: Any,
    weight: tuple[Tensor | int, ...],
    x: Tensor,
    shape: tuple[int, int],
    options: Hashable = 0,
    *,
    transpose: bool = False,
    parts: int = 1,
    cut: Cut | None = None,
) -> Tensor:
    """``x Ŵᵀ``, or ``x Ŵ`` when ``transpose``, for few rows.

    Args:
        decode: the plugin's function (:mod:`modulora_kernels.triton.blocks`). Blocks begin at
            multiples of their own size.
        weight: for ``decode``; tensors are contiguous and on ``x``'s device.
        x: contiguous ``[n, in]``, or ``[n, out]`` when ``transpose``, in fp32, fp16 or bf16; 1 to
            :data:`MOST_ROWS` rows.
        shape: ``(out, in)``.
        options: ``decode``'s constants, hashable.
        parts: the number of parts of a row.
        cut: how to cut the product, by default :func:`chosen`.

    Returns:
        ``[n, out]``, or ``[n, in]`` when ``transpose``, in ``x``'s dtype, summed in fp32, rounded
        once. With more than one row, Ŵ is rounded to ``x``'s dtype first, as in tiles.
    """
    n = x.shape[0]
    cut = cut or chosen(n, x.dtype, transpose)
    part, wanted = -(-shape[1] // parts), shape[1 if transpose else 0]
    blocks, steps, shares = _programs(shape, parts, cut, transpose, n == 1)
    y = torch.empty(
        shares, n, wanted, dtype=x.dtype if shares == 1 else torch.float32, device=x.device
    )
    arguments = (x, weight, y, n, *shape, part, steps)
    constants = {
        "DECODE": decode, "OPTIONS": options, "PARTS": parts, "TRANSPOSE": transpose,
        "ROWS": padded(n, x.dtype), "BLOCK_OUT": cut.block_out, "BLOCK_IN": cut.block_in,
    }  # fmt: skip
    launch(few_rows_kernel, lambda _: (blocks, shares), arguments, constants, (cut.config,))
    return y[0] if shares == 1 else y.sum(dim=0).to(x.dtype)


@lru_cache(maxsize=1024)  # decoding calls this for each layer and token
def _programs(
    shape: tuple[int, int], parts: int, cut: Cut, transpose: bool, one_row: bool
) -> tuple[int, int, int]:
    """The numbers of blocks of outputs, of steps of a program, and of shares of the sum."""
    part = -(-shape[1] // parts)
    if transpose:
        summed, step, blocks = shape[0], cut.block_out, -(-part // cut.block_in) * parts
    else:
        summed, step, blocks = part, cut.block_in, -(-shape[0] // cut.block_out)
    whole = one_row and not transpose and blocks >= ENOUGH_FOR_ONE_ROW
    shares = 1 if whole else max(1, -(-PROGRAMS // blocks))
    in_all = -(-summed // step)
    steps = -(-in_all // shares)
    return blocks, steps, -(-in_all // steps)
