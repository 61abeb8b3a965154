"""Tiles and few-row products on the CPU, once for every quantizer: a plugin writes how rows are decoded, and no loop.

    @jit()
    def decode(weight, row, start, columns, out): ...     # columns start, start + 1, ... of rows row, row + 1, ...

    kernels = RowKernels(decode)

    tile        Ŵ[a:b]       for each 16 rows: decode
    products    Y = X Ŵᵀ     for each strip of rows of Ŵ, for each chunk of columns: decode;  Y[:, strip] += X[:, chunk] · stripᵀ
                X = Y Ŵ      for each share of the rows of Ŵ, for each chunk of columns, for each strip: decode;
                             sums[share, :, chunk] += Y[:, strip] · strip
    blocks      the same of up to 512 rows of X, where that is faster than a tile: see modulora_core.kernels.cpu.block_templates
    squares     the same by AMX, where there is that, of any number of rows: see modulora_core.kernels.cpu.amx_templates

For bf16, tiles and strips alike are decoded into a scratch in the L1 cache and rounded from there, unless the decoder rounds itself.

What a product moves and multiplies, for n rows and a weight of ``out · in`` values of b bits: ``out · in · b / 8`` bytes are
read from memory, once; decoded strips live in the L1 and L2 caches. ``2 n · out · in`` operations are done, beside those of
decoding: in fp32, or in bf16 with sums in fp32, which takes half of the time. The floor is the larger of bytes / bandwidth and
operations / peak. For one row decoding is the bound, from about 16 rows on the multiplications are.

The loops are in :mod:`modulora_core.kernels.cpu.product_templates`, ``block_templates`` and ``amx_templates``, the inner ones in
``product_loops``, ``block_loops`` and ``amx``. Every sum is made in one order, whatever the number of threads.

This module imports numba: plugins import it from their own modules of kernels.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from functools import cache
from types import FunctionType
from typing import TYPE_CHECKING, Any

import torch
from numba.core.registry import cpu_target
from torch import Tensor
from torch.nn import functional as F

from modulora_core.devices.dense_products import onednn_is_faster
from modulora_core.kernels import (
    PARTIAL_SUMS,
    choices,
    few_rows,
    filled_tile,
    jit,
    launch,
    like_input,
    operands,
    product_of_one,
    room_for,
    rows_of,
)
from modulora_core.kernels.cpu import amx, amx_templates, block_templates
from modulora_core.kernels.cpu import product_templates as templates
from modulora_core.kernels.cpu.product_loops import BLOCK
from modulora_core.kernels.cpu.vectors import LANES, has
from modulora_core.packed import PackedWeight
from modulora_core.tiles import tile_bytes

if TYPE_CHECKING:
    from numpy.typing import NDArray

PARTED_ROWS = 32
"""Rows of X up to which a transposed product has :data:`PARTIAL_SUMS` sums; of more rows they would be more memory than a tile, so there
are half as many."""

Weight = tuple[Any, ...]
"""What a decoder reads: whole numbers, and contiguous tensors on the CPU, or arrays (:func:`modulora_core.kernels.operands`)."""


class CPUKernels:
    """The functions ``tile`` and ``product`` of a plugin's module of CPU kernels, made from a decoder.

    Write them like this::

        @jit(borrows=True)
        def decode(weight, row, start, columns, out): ...

        kernels = CPUKernels(decode, operands)
        tile, product = kernels.tile, kernels.product

    The loops around ``decode`` are compiled at their first call for a type of weight, with ``decode`` inlined, and
    cached on disk beside the module of ``decode``.

    Args:
        decode: compiled by :func:`modulora_core.kernels.jit`. ``decode(weight, row, start, columns, out)`` writes
            columns ``[start, start + columns)`` of the rows from ``row`` on, as many as ``out`` has, to the first
            columns of ``out``: fp32 ``[rows, columns or more]``, C-contiguous.
        operands: ``operands(packed)`` gives the ``weight`` of ``decode``: a tuple of contiguous tensors, which
            become arrays, and numbers (:func:`modulora_core.kernels.operands`).
        one_row: ``one_row(weight)`` gives a kernel for one row of inputs, or None. The kernel,
            ``kernel(weight, threads, x, y)``, writes ``y = x Ŵᵀ``, fp32 ``[1, in]`` and ``[1, out]``.
        rounds: whether ``decode`` also takes an ``out`` of bf16 bits, int16, and rounds to them. Otherwise bf16 is
            rounded from an fp32 scratch.
    """

    def __init__(
        self,
        decode: Any,
        operands: Callable[[PackedWeight], Weight],
        one_row: Callable[[Weight], Callable[..., None] | None] = lambda _: None,
        rounds: bool = False,
    ) -> None:
        self._operands, self._one_row = operands, one_row
        self._few, self._few_transposed = (
            _compiled(template, decode) for template in (templates.few, templates.few_transposed)
        )
        self._blocks, self._squares = (
            tuple(_compiled(template, decode) for template in templates_of_both)
            for templates_of_both in (
                (block_templates.blocks, block_templates.blocks_transposed),
                (amx_templates.squares, amx_templates.squares_transposed),
            )
        )
        rounded = decode if rounds else _compiled(templates.rounded, decode, parallel=False)
        self._fill, self._many, self._many_transposed = (
            {
                torch.float32: _compiled(template, decode),
                torch.bfloat16: _compiled(template, rounded),
            }
            for template in (templates.fill, templates.many, templates.many_transposed)
        )

    def dequantize(self, weight: Weight, first: int, out: Tensor) -> None:
        """Rows ``first ...`` of Ŵ to all of ``out``, fp32 or bf16 ``[rows, in]``, contiguous."""
        launch(self._fill[out.dtype], weight, first, out)

    def tile(self, packed: PackedWeight, rows: tuple[int, int], dtype: torch.dtype) -> Tensor:
        """Rows ``[start, stop)`` of Ŵ, ``[stop - start, in]``, in any float dtype, rounded once from fp32."""
        return self._tile(operands(packed, self._operands), rows, packed.shape[1], dtype)

    def product(
        self,
        x: Tensor,
        packed: PackedWeight,
        transpose: bool = False,
        dtype: torch.dtype | None = None,
    ) -> Tensor | None:
        """``x Ŵᵀ``, or ``x Ŵ`` when ``transpose``, in ``x``'s dtype, summed in fp32; None to multiply by tiles.

        Args:
            x: any shape, dtype and device.
            packed: on the CPU.
            transpose: the direction.
            dtype: the dtype of the layer's inputs, where ``x`` was made from them in another one.
        """
        return self._product(
            x, packed.shape, lambda: operands(packed, self._operands), transpose, dtype
        )

    def _tile(
        self, weight: Weight, rows: tuple[int, int], features: int, dtype: torch.dtype
    ) -> Tensor:
        def fill(start: int, _stop: int, out: Tensor) -> None:
            self.dequantize(weight, start, out)

        return filled_tile(fill, rows, features, dtype, (torch.float32, torch.bfloat16))

    def _product(
        self,
        x: Tensor,
        shape: tuple[int, int],
        weight: Callable[[], Weight],
        transpose: bool,
        dtype: torch.dtype | None,
    ) -> Tensor | None:
        given, wanted = shape if transpose else (shape[1], shape[0])
        if not transpose and _is_one_row(x, given):
            arrays = weight()
            one_row = self._one_row(arrays)
            if one_row is not None:
                return product_of_one(one_row, arrays, x, wanted)
        few = few_rows(x, given, choices.FEW_ROWS, dtype)
        if few is None:
            by_amx = _is_for_amx(shape)
            few = few_rows(
                x, given, sys.maxsize if by_amx else _most_in_blocks(shape), dtype, by_amx
            )
            if few is not None and few.dtype is not torch.float32 and not by_amx:
                return None
        return None if few is None else like_input(self.matmul(weight(), few, wanted, transpose), x)

    def matmul(self, weight: Weight, x: Tensor, features: int, transpose: bool = False) -> Tensor:
        """``x Ŵᵀ``, or ``x Ŵ`` when ``transpose``, for few rows.

        Args:
            weight: what the decoder is given.
            x: ``[..., in]``, or ``[..., out]`` when ``transpose``, contiguous, as :func:`modulora_core.kernels.few_rows` gives it: fp32, or
                bf16 of :data:`BLOCK` rows or more. Ŵ is rounded to bf16 for that; sums are fp32.
            features: of the result: ``out``, or ``in`` when ``transpose``.

        Returns:
            fp32 ``[..., features]``, contiguous.
        """
        given = x.shape[-1]
        one_row = None if transpose or x.numel() != given else self._one_row(weight)
        if one_row is not None:
            return product_of_one(one_row, weight, x, features)
        rows = rows_of(x)
        way = self._way_in_blocks(x.dtype, len(rows), (features, given), transpose)
        if way is None:
            return (self._transposed if transpose else self._forward)(weight, x, rows, features)
        y = room_for(x, features)
        kernel, options = way
        for start in range(0, len(rows), choices.MOST_ROWS):
            part = slice(start, start + choices.MOST_ROWS)
            launch(kernel, weight, *_shared(x), *options, rows[part], rows_of(y)[part])
        return torch.from_numpy(y)

    def _way_in_blocks(
        self, dtype: torch.dtype, rows: int, shape: tuple[int, int], transpose: bool
    ) -> tuple[Any, tuple[int, ...]] | None:
        """The kernel that makes blocks of sums of so many rows, and what it is told besides; None where there is a faster one."""
        slices = choices.slices() if dtype is torch.float32 else 1
        if rows >= choices.LEAST_ROWS_OF_SLICES[slices] and _is_for_amx(shape):
            return self._squares[transpose], (slices,)
        few_enough = choices.LEAST_ROWS <= rows <= choices.MOST_ROWS
        is_fp32 = dtype is torch.float32
        return (
            (self._blocks[transpose], ())
            if is_fp32 and few_enough and blocks_are_faster()
            else None
        )

    def _forward(self, weight: Weight, x: Tensor, rows: NDArray[Any], features: int) -> Tensor:
        """``x Ŵᵀ``; ``rows`` are those of ``x``."""
        y, threads = room_for(x, features), torch.get_num_threads()
        if len(rows) >= BLOCK:
            launch(self._many[x.dtype], weight, threads, x.shape[-1], _whole_vectors(x), rows_of(y))
        else:
            launch(self._few, weight, threads, rows, rows_of(y))
        return torch.from_numpy(y)

    def _transposed(self, weight: Weight, x: Tensor, rows: NDArray[Any], features: int) -> Tensor:
        """``x Ŵ``, whose sums are made in parts; ``rows`` as above."""
        n, threads = len(rows), torch.get_num_threads()
        if n < BLOCK:
            sums = torch.empty(PARTIAL_SUMS, n, features)
            launch(self._few_transposed, weight, threads, features, rows, sums)
        else:
            parts = PARTIAL_SUMS if n <= PARTED_ROWS else PARTIAL_SUMS // 2
            sums = torch.empty(parts, n, features + -features % _lanes(x))
            kernel = self._many_transposed[x.dtype]
            launch(kernel, weight, threads, x.shape[-1], features, _whole_vectors(x), sums)
        return sums.sum(dim=0)[:, :features].reshape(*x.shape[:-1], features).contiguous()


class RowKernels(CPUKernels):
    """:class:`CPUKernels` of arrays, for plugins that still name them."""

    def __init__(
        self,
        decode: Any,
        one_row: Callable[..., None] | None = None,
        takes: Callable[[Weight], bool] = lambda _: True,
        rounds: bool = False,
    ) -> None:
        def chosen(weight: Weight) -> Callable[..., None] | None:
            return one_row if takes(weight) else None

        super().__init__(decode, lambda _: (), chosen, rounds)

    def tile(self, weight, rows, features, dtype):  # type: ignore[no-untyped-def, override]
        return self._tile(weight, rows, features, dtype)

    def product(self, x, shape, weight, most, transpose, dtype=None):  # type: ignore[no-untyped-def, override]
        return self._product(x, shape, weight, transpose, dtype)


@cache
def blocks_are_faster() -> bool:
    """Whether sums in blocks are as fast as torch's products: measured for AVX2 and AVX-512 beside MKL, and not where oneDNN's are taken
    instead (docs/performance-findings.md).
    """
    context = cpu_target.target_context
    return any(has(context, feature) for feature in ("avx2", "avx512f")) and not onednn_is_faster()


def _is_one_row(x: Tensor, features: int) -> bool:
    """Whether it can be multiplied as it is: decoding asks for that once a layer and token, so nothing else is asked then."""
    return (
        x.dtype is torch.float32
        and 0 < x.numel() == features
        and x.dim() > 0
        and x.shape[-1] == features
        and x.is_cpu
        and x.is_contiguous()
        and not x.requires_grad
    )


def _shared(x: Tensor) -> tuple[int, int]:
    """Threads, and how many bytes of Ŵ each may decode at once: of the tile budget, and of its cache."""
    threads = torch.get_num_threads()
    return threads, min(tile_bytes(x.device) // threads, choices.decoded_bytes())


def _is_for_amx(shape: tuple[int, int]) -> bool:
    """Whether many rows are multiplied by a weight of this shape, or of its transpose's, by AMX."""
    return math.prod(shape) >= choices.LEAST_FOR_AMX and amx.available()


def _most_in_blocks(shape: tuple[int, int]) -> int:
    """Rows of X up to which blocks of sums are the way for a weight of this shape, where AMX isn't."""
    return choices.most_rows(shape) if blocks_are_faster() else 0


def _lanes(x: Tensor) -> int:
    """How many values of ``x``, fp32 or bf16, are multiplied at once."""
    return LANES * 4 // x.element_size()


def _whole_vectors(x: Tensor) -> NDArray[Any]:
    """The rows of ``x``, padded with zeros to whole vectors."""
    missing = -x.shape[-1] % _lanes(x)
    return rows_of(F.pad(x, (0, missing)) if missing else x)


def _compiled(template: Callable[..., None], decode: Any, parallel: bool = True) -> Any:
    """``template`` with ``decode`` in it, as if it stood in the module of ``decode``.

    numba keeps compiled code by the file of a function and its name: the file is the plugin's, and the name says which decoder it is. It
    also reads the source, which is the decoder's then: another line of that file may be in the midst of a string. A
    function handed over as an argument would be called through a pointer, which takes more time at one row.
    """
    owner = decode.py_func
    there = owner.__code__
    code = template.__code__.replace(
        co_filename=there.co_filename, co_firstlineno=there.co_firstlineno
    )
    function = FunctionType(code, {**template.__globals__, "decode": decode}, template.__name__)
    function.__module__ = owner.__module__
    function.__qualname__ = f"{owner.__qualname__}_{template.__name__}"
    return jit(parallel=parallel)(function)
