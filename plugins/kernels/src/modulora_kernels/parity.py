"""Compare a quantizer's kernels with plain torch on a device, and stop using kernels that differ.

A kernel that is wrong on one card, driver or compiler trains a model in silence. So a packed model
that is loaded on a GPU compares a tile and products of each kind of layer once.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from modulora_core.packed import PackedWeight
from modulora_core.spec import Quantizer
from modulora_kernels import compiled

MOST_ROWS = 64
"""Rows of the tile that is compared."""

ROWS_OF_X = (1, 17)
"""Decoding multiplies one row; training multiplies many."""

_FP32_SUMS = 1e-5
"""Relative error of fp32 sums in another order; wrong kernels err by 0.01 to 1."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """A result of kernels beside plain torch's, for one packed weight.

    Attributes:
        kernels: the packages of kernels that computed it.
        result: such as ``"tile"`` or ``"product with 17 rows, transposed"``.
        shape: of the weight, ``[out, in]``; dtype: of the result.
        error: relative to the norm of plain torch's result; NaN if a kernel raised an exception.
        limit: the largest error of a right kernel.
        reason: the exception, or empty.
    """

    kernels: tuple[str, ...]
    result: str
    shape: tuple[int, int]
    dtype: torch.dtype
    error: float
    limit: float
    reason: str = ""

    @property
    def passed(self) -> bool:
        return self.error <= self.limit

    def __str__(self) -> str:
        out, columns = self.shape
        dtype = str(self.dtype).removeprefix("torch.")
        text = self.reason or f"error {self.error:.1e}, expected at most {self.limit:.1e}"
        return f"{', '.join(self.kernels)}: {self.result} of [{out}, {columns}] in {dtype}: {text}"


def compare(
    quantizer: Quantizer,
    packed: PackedWeight,
    dtype: torch.dtype,
    rows_of_x: Iterable[int] = ROWS_OF_X,
) -> Iterator[Comparison]:
    """Compare a tile and the products of a packed weight, where it is. No kernel: no comparison.

    Raises an exception of the quantizer if no kernel was used.
    """
    rows = min(MOST_ROWS, packed.shape[0])
    yield from _compared(
        "tile", packed, dtype, partial(quantizer.dequantize_tile, packed, (0, rows), dtype)
    )
    generator = torch.Generator().manual_seed(0)
    for n in rows_of_x:
        for transpose in (False, True):
            columns = packed.shape[0 if transpose else 1]
            x = torch.randn(n, columns, generator=generator).to(packed.device, dtype)
            title = f"product with {n} row{'s' * (n > 1)}{', transposed' * transpose}"
            yield from _compared(
                title, packed, dtype, partial(quantizer.matmul, x, packed, transpose)
            )


def _compared(
    title: str, packed: PackedWeight, dtype: torch.dtype, result: partial[Tensor]
) -> Iterator[Comparison]:
    about = title, packed.shape, dtype
    limit = max(2 * torch.finfo(dtype).eps, _FP32_SUMS)
    with compiled.packages_used() as used:
        try:
            found = result()
        except Exception as error:  # of a kernel or its compiler, which may raise anything
            if not used:
                raise  # plain torch raised it
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            yield Comparison(tuple(sorted(used)), *about, float("nan"), limit, reason[:300])
            return
    if not used:
        return
    with compiled.plain_torch():
        expected = result().double()
    distance = float((found.double() - expected).norm() / expected.norm().clamp_min(1e-30))
    yield Comparison(tuple(sorted(used)), *about, distance, limit)


def differences(quantizer: Quantizer, packed: PackedWeight, dtype: torch.dtype) -> list[str]:
    """Say which kernels :func:`compare` finds wrong. Plain torch replaces them in this process."""
    found = []
    for each in compare(quantizer, packed, dtype):
        if not each.passed:
            compiled.stop_using(each.kernels, packed.device)
            found.append(str(each))
    return found
