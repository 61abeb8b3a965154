"""Tiles and products on a GPU, around the decoder that a plugin writes."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor

from modulora_core.packed import PackedWeight
from modulora_core.tiles import tiled_matmul
from modulora_kernels.triton.products import chosen, few_rows, multiply
from modulora_kernels.triton.tiles import ALIGNED, LARGEST, write_tile

FP16_ROOM = 8
"""In fp16 rotated rows are divided by so many times their largest number.

Where no number of C is above 4, sums over 131,000 columns then stay below 65,504."""


class GPUKernels:
    """Make ``tile`` and ``product`` of a plugin's module of GPU kernels from a decoder.

    Write them like this::

        @triton.jit
        def decode(weight, row, col, out_features, in_features, OPTIONS, BLOCK_OUT, BLOCK_IN): ...

        kernels = GPUKernels(decode, operands, options)
        tile, product = kernels.tile, kernels.product

    Args:
        decode: a block of Ŵ (:mod:`modulora_kernels.triton.blocks`).
        operands: ``operands(packed)`` gives the ``weight`` of ``decode``: a tuple of contiguous
            tensors, which become pointers, and whole numbers.
        options: ``options(packed)`` gives the ``OPTIONS`` of ``decode``, a hashable constant.
        parts: ``parts(packed)`` gives the number of parts into which a row falls.
        widest: the most columns of a block in tiles and products of one row: a power of two. A
            format whose blocks of weights are decoded together may want as many.
        strip: rows that are decoded together: a power of two up to 32. Blocks begin at multiples
            of it, and are so high if ``widest`` · ``strip`` is at most 1024.
    """

    def __init__(
        self,
        decode: Any,
        operands: Callable[[PackedWeight], tuple[Tensor | int, ...]],
        options: Callable[[PackedWeight], Hashable] = lambda _: 0,
        parts: Callable[[PackedWeight], int] = lambda _: 1,
        widest: int = LARGEST,
        strip: int = 1,
    ) -> None:
        self._decode, self._operands, self._options, self._parts = decode, operands, options, parts
        self._widest, self._strip = widest, strip

    def tile(self, packed: PackedWeight, rows: tuple[int, int], dtype: torch.dtype) -> Tensor:
        """Rows ``[start, stop)`` of Ŵ, ``[stop - start, in]``, rounded once to ``dtype``."""
        skipped = rows[0] % self._strip
        rows = rows[0] - skipped, rows[1]
        out = torch.empty(rows[1] - rows[0], packed.shape[1], dtype=dtype, device=packed.device)
        weight, options = self._operands(packed), self._options(packed)
        write_tile(
            self._decode,
            weight,
            out,
            rows,
            packed.shape,
            options,
            align=self._widest if self._widest <= ALIGNED else 16,
            parts=self._parts(packed),
            widest=self._widest,
        )
        return out[skipped:]

    def product(self, x: Tensor, packed: PackedWeight, transpose: bool = False) -> Tensor | None:
        """``x Ŵᵀ``, or ``x Ŵ`` when ``transpose``, in ``x``'s dtype; None to multiply by tiles.

        Tiles are for more than :data:`~modulora_kernels.triton.products.MOST_ROWS` rows, for
        fp64, and for an ``x`` of a wrong shape, which the tiled product refuses.
        """
        few = few_rows(x, packed.shape[0 if transpose else 1])
        if few is None:
            return None
        weight, options = self._operands(packed), self._options(packed)
        y = multiply(
            self._decode,
            weight,
            few,
            packed.shape,
            options,
            transpose=transpose,
            parts=self._parts(packed),
            cut=chosen(len(few), few.dtype, transpose, self._widest),
        )
        return y.view(*x.shape[:-1], y.shape[1])

    def product_of_rotated(
        self, x: Tensor, C: PackedWeight, transpose: bool, dtype: torch.dtype
    ) -> Tensor | None:
        """``x Cᵀ``, or ``x C`` if ``transpose``, in fp32; None for fp64.

        Args:
            x: fp32 ``[..., columns]``, or ``[..., rows]`` if ``transpose``: rotated inputs.
            C: of codes alone, whose numbers are at most 4.
            transpose: the direction.
            dtype: of the layer's inputs. Several rows and C are rounded to it for the tensor cores.
        """
        if dtype == torch.float64:
            return None
        narrow, unit = (x, None) if x.numel() == x.shape[-1] else _narrowed(x, dtype)
        y = self.product(narrow, C, transpose)
        if y is None:
            y = tiled_matmul(narrow, lambda a, b, of: self.tile(C, (a, b), of), C.shape, transpose)
        y = y.to(torch.float32)
        return y if unit is None else y * unit


def _narrowed(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """``x`` in ``dtype``, and the divisor of its rows: fp16 ends at 65,504."""
    if dtype != torch.float16:
        return x.to(dtype), None
    unit = FP16_ROOM * x.abs().amax(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    return (x / unit).to(dtype), unit
