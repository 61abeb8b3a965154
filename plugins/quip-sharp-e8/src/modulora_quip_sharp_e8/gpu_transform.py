"""The orthogonal transform on a GPU: products with small matrices on the tensor cores, along one axis of the row after the other.

    H_n = (1/√n) (M_K ⊗ Sylvester_a ⊗ Sylvester_b),   n = K · a · b

    moves      a row once in, in its dtype, and once out in fp32; through memory once more where K is too large for one kernel
    computes   6 (K + a + b) operations a coordinate, in bf16 on tensor cores: 768 at n = 4096, which is 64 · 64
    floor      8 bytes a coordinate for fp32: 512 rows of 4096 are 16.8 MB, 17 µs at 1 TB/s. The operations are 1.6 T, 23 µs at 70 TFLOP/s,
               and hide behind the bytes from about 100 TFLOP/s for each TB/s on

A row is a matrix [a, b], or K of them, and Sylvester_a X Sylvester_b is two products. Butterflies would be 2 log₂ n operations, but in
Triton each of those that reaches beyond a thread's own coordinates is an exchange through shared memory, and which they are isn't for us to
say; a product is one exchange, and what it computes is what tensor cores have plenty of. Their short numbers lose nothing: ±1 is
exact in bf16, and an fp32 number is the sum of three (:func:`exact_dot`), so that products are exact and sums are in fp32. Hartley's
matrices, whose entries aren't ±1, are split in three as well.

A program has one row, or a part of one, or rows that don't meet: a row's bits are the same in any company.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from modulora_core.kernels.triton.blocks import dot
from modulora_core.kernels.triton.launching import Config, launch
from modulora_quip_sharp_e8.hadamard import LARGEST_ORDER, hadamard
from modulora_quip_sharp_e8.transform import factor

LARGEST = 128
"""Rows and columns of a factor that a program holds whole."""

TILE = 8192
"""Numbers that a program holds in registers, with as many sums: more would spill."""

FEWEST = 1024
"""Numbers of a program, where a row has more than one in the first kernel."""

SMALLEST = 16
"""What a tensor core takes; smaller factors are padded with zeros."""

TOGETHER = 64
"""Rows of a matrix that a program multiplies at once from the right alone."""

COLUMNS, TERMS = 64, 32
"""Columns of a program in the product with a far factor, as many outputs at most, and the terms that it sums at a time."""

PASS = 128
"""To write a row and to read it again, as a number of terms of a product that take as long: about 100 on a GeForce 3090, 300 on an H100."""


@dataclass(frozen=True, slots=True)
class Plan:
    """H_n as products along axes: a row is ``[far, left, right]``, and each axis has a factor of its order.

    Attributes:
        far: order of M_K ⊗ Sylvester where it takes a kernel of its own, else 1.
        left: order of the factor from the left, M_K ⊗ Sylvester or, where ``far`` has M_K, Sylvester's.
        right: order of the factor from the right, Sylvester's.
    """

    far: int
    left: int
    right: int

    @property
    def terms(self) -> float:
        """What it costs: terms of products for each coordinate, with those that padding adds."""
        rows, columns = padded(self.left) / self.left, padded(self.right) / self.right
        near = (
            padded(self.right)
            if self.left == 1
            else rows * padded(self.right) + padded(self.left) * columns
        )
        return near if self.far == 1 else near + PASS + padded(self.far, COLUMNS) ** 2 / self.far

    @property
    def fits(self) -> bool:
        """Whether a program can hold its numbers, and has enough of them to be worth starting."""
        held = (TOGETHER if self.left == 1 else padded(self.left)) * padded(self.right)
        enough = self.far == 1 or held >= FEWEST
        return (
            enough
            and held <= TILE
            and max(self.left, self.right) <= LARGEST
            and self.far <= LARGEST_ORDER
        )


@lru_cache(maxsize=256)
def plan(K: int, m: int) -> Plan | None:
    """The cheapest way to multiply by H_n, n = K · m: in one kernel where that can be, with the longest rows; None if the kernels can't."""
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
    """A power of two that tensor cores take, or a multiple of ``largest``."""
    if order > largest:
        return -(-order // largest) * largest
    return max(SMALLEST, 1 << (order - 1).bit_length())


@triton.jit
def first_bits(x) -> Any:  # type: ignore[no-untyped-def]
    """The first eight bits of fp32 numbers, as bf16, and the rest of them: nothing is lost."""
    bits = x.to(tl.int32, bitcast=True)
    first = (bits >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
    return first, x - (bits & -65536).to(tl.float32, bitcast=True)


@triton.jit
def exact_dot(m, x, total, LEFT: tl.constexpr) -> Any:  # type: ignore[no-untyped-def]
    """``total + m x``, or ``total + x m`` unless LEFT, in fp32: ``m`` is bf16, and of the 24 bits of ``x``, fp32, none is lost."""
    high, rest = first_bits(x)
    middle, rest = first_bits(rest)
    low, rest = first_bits(rest)  # the small products are summed first
    if LEFT:  # noqa: SIM108 - two shapes of a product, each in a line
        total = dot(m, high, dot(m, middle, dot(m, low, total)))
    else:
        total = dot(high, m, dot(middle, m, dot(low, m, total)))
    return total


@triton.jit
def times_factor(factor, at, size, x, total, PARTS: tl.constexpr, LEFT: tl.constexpr) -> Any:  # type: ignore[no-untyped-def]
    """:func:`exact_dot` with the sum of PARTS matrices of ``size`` numbers each, the smallest last; ``at``: where in each."""
    for part in tl.static_range(PARTS):
        m = tl.load(factor + (PARTS - 1 - part) * size + at)
        total = exact_dot(m, x, total, LEFT)
    return total


@triton.jit(do_not_specialize=["rows"])  # which is only compared
def turn_kernel(  # type: ignore[no-untyped-def]
    x, before, left, right, after, out, scale, rows, period,
    A: tl.constexpr, B: tl.constexpr, PADDED_A: tl.constexpr, PADDED_B: tl.constexpr,
    LEFT: tl.constexpr, PARTS: tl.constexpr, BEFORE: tl.constexpr, AFTER: tl.constexpr,
):  # fmt: skip
    """``out = (left ((x ⊙ before) scale) right) ⊙ after`` for a matrix of A rows and B columns, one a program.

    ``x`` is all of these matrices, ``[rows, B]``; ``before`` and ``after`` have ``period`` such rows. ``left`` is
    ``[PARTS, PADDED_A, PADDED_A]``, ``right`` ``[PADDED_B, PADDED_B]``, both bf16 and zero where they are padded. Without LEFT a
    matrix is any A rows.
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
    PARTS: tl.constexpr, AFTER: tl.constexpr, OUTPUTS: tl.constexpr, COLUMNS: tl.constexpr, TERMS: tl.constexpr,
):  # fmt: skip
    """``out[r] = (factor x[r]) ⊙ after`` for rows of K by m numbers, fp32; ``factor`` is ``[PARTS, size, size]``, zero beyond K."""
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
    """(M_K ⊗ Sylvester)ᵀ, or without the transpose, as a sum of bf16 matrices: ``[parts, size, size]``, zero beyond its order.

    That is what columns are multiplied by, from the left, where rows are by M_K ⊗ Sylvester from the right. The sum is what fp32
    holds of the matrix: one part where its entries are ±1, else three.
    """
    rest = torch.kron(factor(K), hadamard(sylvester).double()).to(torch.float32)
    rest = F.pad(rest if transpose else rest.T, (0, size - len(rest), 0, size - len(rest)))
    parts: list[Tensor] = []
    while not parts or bool(rest.any()):
        parts.append(rest.to(torch.bfloat16))
        rest = rest - parts[-1].float()
    return torch.stack(parts).to(device)


def rotate(
    x: Tensor, K: int, transpose: bool, before: Tensor | None, after: Tensor | None
) -> Tensor | None:
    """:func:`modulora_quip_sharp_e8.transform.rotate` for ``x`` ``[rows, n]`` with at least one row: fp32, or None if there is no plan.

    Args:
        x: fp32, fp16 or bf16, contiguous.
        K: the order of M_K.
        transpose: H_nᵀ.
        before, after: ``[n]``, any float dtype, or None.
    """
    rows, n = x.shape
    axes = plan(K, n // K)
    if axes is None:
        return None
    out = torch.empty(rows, n, dtype=torch.float32, device=x.device)
    last = after if axes.far == 1 else None
    _turn(x, axes, K, transpose, before, last, out)
    if axes.far > 1:
        turned, out = out, torch.empty_like(out)
        _across(turned, axes, K, transpose, after, out)
    return out


def _turn(
    x: Tensor,
    axes: Plan,
    K: int,
    transpose: bool,
    before: Tensor | None,
    after: Tensor | None,
    out: Tensor,
) -> None:
    """Both near axes."""
    n = x.shape[1]
    left, right, shared, configs = _near(axes, K, transpose, x.device)
    rows = x.numel() // axes.right
    constants = shared | {"BEFORE": before is not None, "AFTER": after is not None}
    vectors = out if before is None else before, out if after is None else after
    arguments = (x, vectors[0], left, right, vectors[1], out, n**-0.5, rows, n // axes.right)
    launch(turn_kernel, lambda _: (-(-rows // shared["A"]),), arguments, constants, configs)


@lru_cache(maxsize=64)  # decoding asks for each layer and token
def _near(
    axes: Plan, K: int, transpose: bool, device: torch.device
) -> tuple[Tensor, Tensor, dict[str, int], tuple[Config]]:
    """The factors from the left and from the right, the kernel's constants that go with them, and its configuration."""
    alone = axes.left == 1  # then rows of different matrices go together
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


def _across(
    x: Tensor, axes: Plan, K: int, transpose: bool, after: Tensor | None, out: Tensor
) -> None:
    """The far axis."""
    rows, n = x.shape
    m = n // axes.far
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
