"""Tiles and products on the CPU, around the decoder that a plugin writes."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import FunctionType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from modulora_core.packed import PackedWeight
from modulora_kernels.compiled import jit
from modulora_kernels.cpu import choices, products
from modulora_kernels.launching import (
    filled_tile,
    launch,
    operands,
    product_of_one,
)

Operands = tuple[Any, ...]
"""Arrays and numbers that a decoder reads."""

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class CPUKernels:
    """Make ``tile`` and ``product`` of a plugin's module of CPU kernels from a decoder.

    Write them like this::

        @jit(borrows=True)
        def decode(weight, row, start, columns, out): ...

        kernels = CPUKernels(decode, operands)
        tile, product = kernels.tile, kernels.product

    The loops around ``decode`` are compiled at their first call for a type of weight, and cached on
    disk beside this module. Every sum is made in one order, whatever the number of
    threads.

    Args:
        decode: compiled by :func:`modulora_kernels.jit`. ``decode(weight, row, start, columns,
            out)`` writes columns ``[start, start + columns)`` of the rows from ``row`` on, as many
            as ``out`` has, to the first columns of ``out``: fp32 ``[rows, columns or more]``,
            C-contiguous.
        operands: ``operands(packed)`` gives the ``weight`` of ``decode``: a tuple of contiguous
            tensors, which become arrays, and numbers (:func:`modulora_kernels.operands`).
        one_row: ``one_row(weight)`` gives a kernel for one row of inputs, or None. The kernel,
            ``kernel(weight, threads, x, y)``, writes ``y = x Ŵᵀ``, fp32 ``[1, in]`` and ``[1,
            out]``.
        rounds: whether ``decode`` also takes an ``out`` of bf16 bits, int16, and rounds to them.
            Otherwise bf16 is rounded from fp32 scratch.
    """

    def __init__(
        self,
        decode: Any,
        operands: Callable[[PackedWeight], Operands],
        one_row: Callable[[Operands], Callable[..., None] | None] = lambda _: None,
        rounds: bool = False,
    ) -> None:
        self._operands, self._one_row = operands, one_row
        # a decoder of a notebook has no file, whose change would make a cached loop stale
        compiled = partial(_compiled, cache=Path(inspect.getfile(python_of(decode))).exists())
        rounded = decode if rounds else compiled(products.rounded, decode, parallel=False)
        decoders = {torch.float32: decode, torch.bfloat16: rounded}
        self._fill = {dtype: compiled(products.fill, made) for dtype, made in decoders.items()}
        self._products = {
            dtype: [compiled(loop, made) for loop in (products.forward, products.transposed)]
            for dtype, made in decoders.items()
        }

    def tile(self, packed: PackedWeight, rows: tuple[int, int], dtype: torch.dtype) -> Tensor:
        """Rows ``[start, stop)`` of Ŵ, ``[stop - start, in]``, rounded once to ``dtype``."""
        weight = operands(packed, self._operands)

        def fill(start: int, _stop: int, out: Tensor) -> None:
            launch(self._fill[out.dtype], weight, start, out)

        return filled_tile(fill, rows, packed.shape[1], dtype, tuple(self._fill))

    def product(
        self,
        x: Tensor,
        packed: PackedWeight,
        transpose: bool = False,
        dtype: torch.dtype | None = None,
    ) -> Tensor | None:
        """``x Ŵᵀ``, or ``x Ŵ``, in ``x``'s dtype, summed in fp32; None to multiply by tiles.

        Args:
            x: any shape, dtype and device.
            packed: on the CPU.
            transpose: the direction.
            dtype: of the layer's inputs, if ``x`` was computed from them in another one.
        """
        given, wanted = packed.shape if transpose else reversed(packed.shape)
        n = x.numel() // given if given and wanted else 0
        # tiles are for fp64, which needs fp64 sums, and say how a shape is wrong
        if n == 0 or not x.is_cpu or x.dtype not in _DTYPES or x.shape[-1:] != (given,):
            return None
        arrays = operands(packed, self._operands)
        one_row = None if transpose or n > 1 else self._one_row(arrays)
        if one_row is not None:
            is_plain = x.dtype is torch.float32 and x.is_contiguous() and not x.requires_grad
            row = x if is_plain else x.detach().to(torch.float32).contiguous()
            y = product_of_one(one_row, arrays, row, wanted)
            return y if x.dtype is torch.float32 else y.to(x.dtype)
        dtype, threads = dtype or x.dtype, torch.get_num_threads()
        rows = x.detach().reshape(n, given)
        inner = choices.dtype_of_few(n, dtype)
        if inner is None:
            return None
        padded = F.pad(rows.to(inner), (0, -given % products.COLUMNS)).contiguous()
        sums = torch.empty(n, wanted, dtype=torch.float32, device="cpu")
        launch(self._products[inner][transpose], arrays, threads, given, padded, sums)
        return sums.to(x.dtype).view(*x.shape[:-1], wanted)


def _compiled(
    template: Callable[..., None], decode: Any, *, cache: bool, parallel: bool = True
) -> Any:
    """Compile ``template`` with ``decode`` as one of its globals.

    A decoder that was handed over as an argument would be called through a pointer. numba caches by
    file and name: the name has the decoder's module, name, hash of sources and line.
    """
    owner = python_of(decode)
    function = FunctionType(
        template.__code__, {**template.__globals__, "decode": decode}, template.__name__
    )
    line = owner.__code__.co_firstlineno
    function.__qualname__ = f"{owner.__module__}.{owner.__qualname__}_{line}_{template.__name__}"
    return jit(parallel=parallel, cache=cache)(function)


def python_of(function: Any) -> Any:
    """The Python function that numba compiles; with ``NUMBA_DISABLE_JIT`` it is that already."""
    return getattr(function, "py_func", function)
