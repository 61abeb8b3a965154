"""Products of few rows with Ŵ on a GPU, without materialising it: around a plugin's decode function.

    forward      y[n, out] = Σ_in  x[n, in]  Ŵ[out, in]
    transposed   y[n, in]  = Σ_out x[n, out] Ŵ[out, in]

    moves      the codes once, x once for each block of outputs (from L2), y once: b / 8 bytes a weight for b bits
    computes   the decode once, and 2 n operations a weight
    floor      the codes' bytes at the rate of memory, while decoding keeps up

A program has a block of the outputs and a *share* of the sum; it decodes a block of Ŵ into registers at a time and adds
to fp32 sums. For one row it multiplies and adds, each thread for itself, and sums across threads once at its end. For more
``tl.dot`` takes the block of Ŵ as its left operand and the rows of x, padded, as its right one. Shares are summed by torch in a
fixed order: no atomics, the same bits every time.

For more than :data:`MOST_ROWS` rows decoded tiles and cuBLAS are the way (:func:`modulora_core.tiles.tiled_matmul`).

Nothing is timed here: which block a program takes decides the order of the sum, and a result mustn't depend on how
busy a machine was when it was tuned. :func:`chosen` is the rule; pass another :class:`Cut` to look for a better one.
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

from modulora_core.kernels.triton.blocks import dot, rounded
from modulora_core.kernels.triton.launching import Config, launch

MOST_ROWS = 32
"""Rows of x that the kernel takes."""

PROGRAMS = 512
"""How many programs a product is cut into at least, where the weight is large enough: about four for each processor of a large GPU.

Fixed, and not the number of processors, so that the order of a sum is the same on every card."""

ENOUGH_FOR_ONE_ROW = 128
"""Programs from which on the forward of one row isn't cut into shares to make more of them: to start the kernels that add shares and round
takes longer than such a product. An estimate: no card has measured it."""

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


def chosen(n: int, dtype: torch.dtype, transpose: bool) -> Cut:
    """The rule: a function of the number of rows, x's dtype and the direction alone.

    16 or 32 weights a thread: loads of 16 bytes, and no spills with as many sums beside them. For one row, blocks are wide
    along the rows of Ŵ, as memory likes it, and less so where each column more is a partial sum more to write.
    """
    if (
        n > 1 and dtype == torch.float32
    ):  # no tensor cores but registers, so less of the sum at a time
        return Cut(32, 64) if transpose else Cut(64, 32)
    if n > 1:
        return Cut(64, 64)
    return Cut(16, 256) if transpose else Cut(8, 512)


def padded(n: int, dtype: torch.dtype) -> int:
    """Rows that the kernel is compiled for: a power of two, and where tensor cores multiply, so in 16 bits, 1 or at least 16."""
    if n == 1 or dtype == torch.float32:
        return 1 << (n - 1).bit_length()
    return 16 if n <= 16 else 32


@triton.jit(
    do_not_specialize=["n", "steps"]
)  # or it would be compiled again for 1, and for multiples of 16
def few_rows_kernel(  # type: ignore[no-untyped-def]
    x, weight, y, n, out_features, in_features, part_columns, steps,
    DECODE: tl.constexpr, OPTIONS: tl.constexpr, PARTS: tl.constexpr, TRANSPOSE: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_OUT: tl.constexpr, BLOCK_IN: tl.constexpr,
):  # fmt: skip
    """``y[s] = x Ŵᵀ``, or ``x Ŵ``, over share s of the sum, which is so many ``steps``; x ``[n, given]``, y ``[shares, n, wanted]``.

    Of a row that falls into PARTS, a program sums over the same columns of all; where columns are kept, they are of one part,
    and programs beside it have the same ones of the others.
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
    if ROWS == 1:  # noqa: SIM108 - the compiler would make both
        total = tl.zeros((BLOCK_OUT, BLOCK_IN), tl.float32)
    else:
        total = tl.zeros((KEPT, ROWS), tl.float32)
    # one loop over blocks and parts, so that the next loads are under way in either; unrolled, eight parts would spill
    for step in range(begin * SUMMED, end * SUMMED):
        at = step // SUMMED * STEP  # so that the compiler sees what it is a multiple of
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
    """``x`` as :func:`multiply` takes it, contiguous ``[n, features]``; None where tiles are the way.

    They are for more than ``most`` rows, for fp64, and for a wrong last dimension, so that the tiled product says what is wrong.
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
        decode: the plugin's function (:mod:`modulora_core.kernels.triton.blocks`). Blocks begin at multiples of their own size.
        weight: what ``decode`` takes apart; tensors are contiguous and on ``x``'s device.
        x: contiguous ``[n, in]``, or ``[n, out]`` when ``transpose``; 1 to :data:`MOST_ROWS` rows of fp32, fp16 or bf16.
        shape: ``(out, in)``; options: ``decode``'s constants, hashable; parts: into how many parts a row falls.
        cut: how to cut the product, by default :func:`chosen`.

    Returns:
        ``[n, out]``, or ``[n, in]`` when ``transpose``, in ``x``'s dtype, summed in fp32 and rounded once. Of more than one row
        Ŵ is rounded to ``x``'s dtype before it is multiplied, as tiles are.
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


@lru_cache(maxsize=1024)  # decoding asks for each layer and token
def _programs(
    shape: tuple[int, int], parts: int, cut: Cut, transpose: bool, one_row: bool
) -> tuple[int, int, int]:
    """How many blocks of outputs there are, how many steps a program makes, and into how many shares the sum is cut."""
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
