"""The rotation on a GPU: products with small matrices on tensor cores, along the axes of a row.

    H_n = (1/√n) (M_K ⊗ Sylvester_a ⊗ Sylvester_b),   n = K · a · b

    moves      a row in, in its dtype, and out in fp32; once more if K is too large for one kernel
    computes   6 (K + a + b) operations a coordinate, in bf16: 768 at n = 4096 = 64 · 64
    floor      8 bytes a coordinate for fp32 at the rate of memory

A row is K matrices X, [a, b], and Sylvester_a X Sylvester_b is two products. Butterflies
would be 2 log₂ n operations, but most of them exchange numbers between threads. A product is one
exchange. bf16 loses nothing: ±1 is exact in it, and an fp32 number is the sum of three
(:func:`exact_dot`). Sums are in fp32. Hartley's matrices are split in three as well.

No two rows meet in a sum, so the bits of a row do not depend on other rows.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from modulora_kernels.rotation.hadamard import LARGEST_ORDER, hadamard
from modulora_kernels.rotation.transform import factor, order
from modulora_kernels.triton import Config, dot, launch

LARGEST = 128
"""Rows and columns of a factor that a program holds whole."""

TILE = 8192
"""Numbers of a program, with as many sums: more would not fit its registers."""

FEWEST = 1024
"""The fewest numbers of a program in the first of two kernels."""

SMALLEST = 16
"""The least order that a tensor core takes; smaller factors are padded with zeros."""

TOGETHER = 64
"""Rows of a matrix that a program multiplies from the right alone."""

COLUMNS, TERMS = 64, 32
"""Columns of a program in the product with a far factor, as many outputs, and terms at a time."""

PASS = 128
"""Terms of a product that take as long as writing a row and reading it again."""


class Plan(NamedTuple):
    """H_n as products along axes: a row is ``[far, left, right]``, and each axis has a factor.

    Attributes:
        far: order of M_K ⊗ Sylvester if that has a kernel of its own, else 1.
        left: order of the factor from the left, M_K ⊗ Sylvester, or Sylvester's if ``far`` has M_K.
        right: order of the factor from the right, Sylvester's.
    """

    far: int
    left: int
    right: int

    @property
    def terms(self) -> float:
        """The cost: terms of products for each coordinate, padding included."""
        near: float = padded(self.right)
        if self.left > 1:
            rows, columns = padded(self.left) / self.left, padded(self.right) / self.right
            near = rows * padded(self.right) + padded(self.left) * columns
        return near if self.far == 1 else near + PASS + padded(self.far, COLUMNS) ** 2 / self.far

    @property
    def fits(self) -> bool:
        """Whether the registers of a program hold its numbers, and it has enough work to start."""
        held = (TOGETHER if self.left == 1 else padded(self.left)) * padded(self.right)
        enough = self.far == 1 or held >= FEWEST
        small = max(self.left, self.right) <= LARGEST and self.far <= LARGEST_ORDER
        return enough and small and held <= TILE


@lru_cache(maxsize=256)
def plan(K: int, m: int) -> Plan | None:
    """The cheapest products for H_n, n = K · m; None if no kernel can compute it.

    One kernel is better than two, and long rows are better than short ones.
    """
    powers = [2**i for i in range(m.bit_length())]
    found = [Plan(1, K * m // right, right) for right in powers]
    found += [
        Plan(K * (m // (left * right)), left, right)
        for right in powers
        for left in powers
        if left * right <= m
    ]
    fitting = [axes for axes in found if axes.fits]
    return min(fitting, key=lambda axes: (axes.far > 1, axes.terms, -axes.right), default=None)


def padded(order: int, largest: int = LARGEST) -> int:
    """The size to pad to: a power of two that tensor cores take, or a multiple of ``largest``."""
    if order > largest:
        return -(-order // largest) * largest
    return max(SMALLEST, 1 << (order - 1).bit_length())


@triton.jit
def first_bits(x) -> Any:  # type: ignore[no-untyped-def]
    """The first eight bits of fp32 numbers, as bf16, and the rest, exactly."""
    bits = x.to(tl.int32, bitcast=True)
    first = (bits >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
    return first, x - (bits & -65536).to(tl.float32, bitcast=True)


@triton.jit
def exact_dot(m, x, total, LEFT: tl.constexpr) -> Any:  # type: ignore[no-untyped-def]
    """``total + m x``, or ``total + x m`` unless LEFT: m is bf16, x fp32, products are exact."""
    high, rest = first_bits(x)
    middle, rest = first_bits(rest)
    low, rest = first_bits(rest)  # the small products are summed first
    if LEFT:
        total = dot(m, high, dot(m, middle, dot(m, low, total)))
    else:
        total = dot(high, m, dot(middle, m, dot(low, m, total)))
    return total


@triton.jit
def times_factor(  # type: ignore[no-untyped-def]
    factor, at, size, x, total, PARTS: tl.constexpr, LEFT: tl.constexpr
) -> Any:
    """:func:`exact_dot` with the sum of PARTS matrices of ``size`` numbers, read at ``at``."""
    for part in tl.static_range(PARTS):
        m = tl.load(factor + (PARTS - 1 - part) * size + at)
        total = exact_dot(m, x, total, LEFT)
    return total


@triton.jit(do_not_specialize=["rows"])
def turn_kernel(  # type: ignore[no-untyped-def]
    x, before, left, right, after, out, scale, rows, period,
    A: tl.constexpr, B: tl.constexpr, PADDED_A: tl.constexpr, PADDED_B: tl.constexpr,
    LEFT: tl.constexpr, PARTS: tl.constexpr, BEFORE: tl.constexpr, AFTER: tl.constexpr,
):  # fmt: skip
    """``out = (left ((x ⊙ before) scale) right) ⊙ after`` for a matrix [A, B] a program.

    ``x`` is all matrices, ``[rows, B]``; ``before`` and ``after`` have ``period`` such rows.
    ``left`` is ``[PARTS, PADDED_A, PADDED_A]``, ``right`` ``[PADDED_B, PADDED_B]``, both bf16 with
    zeros in the padding. Without LEFT a matrix is any A rows.
    """
    i = tl.arange(0, PADDED_A)
    j = tl.arange(0, PADDED_B)
    row = tl.program_id(0).to(tl.int64) * A + i
    inside = ((i < A) & (row < rows))[:, None] & (j < B)[None, :]
    at = row[:, None] * B + j[None, :]
    first = (tl.program_id(0).to(tl.int64) * A % period).to(tl.int32)
    place = ((first + i) % period)[:, None] * B + j[None, :]
    value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    if BEFORE:
        value = value * tl.load(before + place, mask=inside, other=0.0).to(tl.float32)
    value = value * scale
    zero = tl.zeros((PADDED_A, PADDED_B), tl.float32)
    square = j[:, None] * PADDED_B + j[None, :]
    value = times_factor(right, square, 0, value, zero, 1, False)
    if LEFT:
        square = i[:, None] * PADDED_A + i[None, :]
        value = times_factor(left, square, PADDED_A * PADDED_A, value, zero, PARTS, True)
    if AFTER:
        value = value * tl.load(after + place, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + at, value, mask=inside)


@triton.jit
def across_kernel(  # type: ignore[no-untyped-def]
    x, factor, after, out, K, m, size,
    PARTS: tl.constexpr, AFTER: tl.constexpr, OUTPUTS: tl.constexpr, COLUMNS: tl.constexpr,
    TERMS: tl.constexpr,
):  # fmt: skip
    """``out[r] = (factor x[r]) ⊙ after`` for rows ``[K, m]`` of fp32.

    ``factor`` is ``[PARTS, size, size]``, zero beyond K."""
    bands = tl.cdiv(K, OUTPUTS)
    strips = tl.cdiv(m, COLUMNS)
    band = tl.program_id(0) % bands
    strip = tl.program_id(0) // bands % strips
    row = (tl.program_id(0) // (bands * strips)).to(tl.int64) * K * m
    o = band * OUTPUTS + tl.arange(0, OUTPUTS)
    t = strip * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros((OUTPUTS, COLUMNS), tl.float32)
    for first in range(0, K, TERMS):
        k = first + tl.arange(0, TERMS)
        value = tl.load(
            x + row + k[:, None] * m + t[None, :],
            mask=(k < K)[:, None] & (t < m)[None, :],
            other=0.0,
        )
        total = times_factor(
            factor, o[:, None] * size + k[None, :], size * size, value, total, PARTS, True
        )
    place = o[:, None] * m + t[None, :]
    inside = (o < K)[:, None] & (t < m)[None, :]
    if AFTER:
        total = total * tl.load(after + place, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row + place, total, mask=inside)


@lru_cache(maxsize=64)
def matrices(K: int, sylvester: int, transpose: bool, size: int, device: torch.device) -> Tensor:
    """(M_K ⊗ Sylvester)ᵀ, untransposed if ``transpose``, as a sum of bf16 matrices.

    It multiplies columns from the left. The parts add up to the matrix in fp32: one part if all
    entries are ±1, else three. ``[parts, size, size]``, zero beyond the order.
    """
    rest = torch.kron(factor(K), hadamard(sylvester).double()).to(torch.float32)
    rest = F.pad(rest if transpose else rest.T, (0, size - len(rest), 0, size - len(rest)))
    parts: list[Tensor] = []
    while not parts or bool(rest.any()):
        parts.append(rest.to(torch.bfloat16))
        rest = rest - parts[-1].float()
    return torch.stack(parts).to(device)


def turned(
    x: Tensor, transpose: bool, before: Tensor | None, after: Tensor | None
) -> Tensor | None:
    """``((x ⊙ before) H_n) ⊙ after``, or by H_nᵀ: fp32 ``[rows, n]``, or None without a plan.

    Args:
        x: ``[rows, n]``, at least one row; fp32, fp16 or bf16, contiguous.
        transpose: multiply by H_nᵀ.
        before, after: ``[n]``, any float dtype, or None.
    """
    rows, n = x.shape
    K = order(n)
    axes = plan(K, n // K)
    if axes is None:
        return None
    out = torch.empty(rows, n, dtype=torch.float32, device=x.device)
    last = after if axes.far == 1 else None
    _turn(x, axes, transpose, before, last, out)
    if axes.far > 1:
        near, out = out, torch.empty_like(out)
        _across(near, axes, transpose, after, out)
    return out


def rotate(
    x: Tensor,
    scale: Tensor | None,
    unit: Tensor | None,
    *,
    after: bool,
    transpose: bool,
    in_place: bool,  # noqa: ARG001
    dtype: torch.dtype,
    block: int | None,
) -> Tensor | None:
    """:func:`modulora_kernels.rotation.rotate` for ``x`` ``[rows, n]``, not of fp64.

    None for a dimension without a plan.
    """
    if scale is not None:
        scale = scale.detach() if unit is None else scale.detach() * unit
    if block is not None:  # its rows are shorter than the scale
        rows = x if scale is None or after else x.to(torch.float32) * scale
        apart = turned(rows.reshape(-1, block).contiguous(), transpose, None, None)
        if apart is None:
            return None
        apart = apart.view(x.shape)
        return (apart if scale is None or not after else apart * scale).to(dtype)
    vectors = (None, scale) if after else (scale, None)
    y = turned(x.contiguous(), transpose, *vectors)
    return None if y is None else y.to(dtype)


def _turn(
    x: Tensor,
    axes: Plan,
    transpose: bool,
    before: Tensor | None,
    after: Tensor | None,
    out: Tensor,
) -> None:
    """Both near axes."""
    n = x.shape[1]
    left, right, shared, configs = _near(axes, order(n), transpose, x.device)
    rows = x.numel() // axes.right
    constants = shared | {"BEFORE": before is not None, "AFTER": after is not None}
    vectors = out if before is None else before, out if after is None else after
    arguments = (x, vectors[0], left, right, vectors[1], out, n**-0.5, rows, n // axes.right)
    launch(turn_kernel, lambda _: (-(-rows // shared["A"]),), arguments, constants, configs)


@lru_cache(maxsize=64)  # decoding calls this for each layer and token
def _near(
    axes: Plan, K: int, transpose: bool, device: torch.device
) -> tuple[Tensor, Tensor, dict[str, int], tuple[Config]]:
    """The factors from the left and the right, the kernel's constants, and its configuration."""
    alone = axes.left == 1  # rows of different matrices may then share a program
    A, B = TOGETHER if alone else axes.left, axes.right
    right = matrices(1, B, False, padded(B), device)
    left = right
    if not alone:
        order = K if axes.far == 1 else 1
        left = matrices(order, axes.left // order, transpose, padded(A), device)
    constants = {
        "A": A,
        "B": B,
        "PADDED_A": padded(A),
        "PADDED_B": padded(B),
        "LEFT": not alone,
        "PARTS": len(left),
    }
    warps = max(4, padded(A) * padded(B) // 1024)  # up to 32 numbers a thread
    return left, right, constants, (Config(warps),)


def _across(x: Tensor, axes: Plan, transpose: bool, after: Tensor | None, out: Tensor) -> None:
    """The far axis."""
    rows, n = x.shape
    K, m = order(n), n // axes.far
    size = padded(axes.far, COLUMNS)
    outputs = min(size, COLUMNS)
    factors = matrices(K, axes.far // K, transpose, size, x.device)
    programs = rows * (size // outputs) * -(-m // COLUMNS)
    constants = {
        "PARTS": len(factors), "AFTER": after is not None, "OUTPUTS": outputs, "COLUMNS": COLUMNS,
        "TERMS": min(size, TERMS),
    }  # fmt: skip
    arguments = (x, factors, out if after is None else after, out, axes.far, m, size)
    launch(across_kernel, lambda _: (programs,), arguments, constants)
