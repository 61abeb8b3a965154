"""Products of dense matrices, and by which of torch's libraries they are made.

    product        X W
    put_product    Y  = X W          X : [n, k]   W : [k, m]   Y : [n, m]
    add_product    Y += X W
    linear         X Wᵀ + b, of a frozen layer, with its backward  dX = dY W

    matmul_precision   how much of fp32 products may be rounded away

On x86 torch multiplies fp32 matrices by MKL. On an AMD processor with AVX-512 it was no faster than AVX2 allows, probably because it asks
for the vendor. oneDNN, which torch brings too and multiplies bf16 by, goes by the instructions that are there: on Zen 5
it takes 0.45 × MKL's time, from four rows on (docs/performance-findings.md). So there fp32 products are made by oneDNN, and elsewhere as
ever: on Intel's both are as fast.
``torch.backends.mkldnn.enabled = False`` leaves all of them to torch.

Both sum in fp32, in other orders.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

LEAST_PRODUCTS = 2**20
"""Multiplications of a product below which choosing a library costs more than it gains: 16 rows by 256 x 256."""

LEAST_PRODUCTS_OF_A_ROW = 2**23
"""The same for a single row, where reading W is all, and oneDNN the faster reader from memory alone."""

SCRATCH_BYTES = 4 * 2**20
"""oneDNN writes to memory of its own; what is put or added elsewhere is made so much of at a time."""

LEAST_ROWS = 128
"""Rows that are multiplied at once however wide they are: fewer would read W too often."""

KEPT_SIZES = 64
"""Sizes of products whose code oneDNN keeps: the packed layers of SmolLM2 have 8 in a step."""


def is_plain(x: Tensor) -> bool:
    """Whether it stands for no other, as what lies on several devices does, or what `modulora plan` rehearses with and has no memory."""
    return type(x) in (Tensor, torch.nn.Parameter)


def product(x: Tensor, w: Tensor) -> Tensor:
    """X W, of two matrices of one dtype, in that dtype. Not differentiable.

    Any strides will do, but only a W that is contiguous, as it is or transposed, is multiplied by oneDNN.
    """
    return _multiplied(x, w) if _is_onednns(x, w) else torch.mm(x, w)


def put_product(y: Tensor, x: Tensor, w: Tensor) -> None:
    """Y = X W, rounded to Y's dtype."""
    if y.dtype != x.dtype:
        y.copy_(product(x, w))
    elif _is_onednns(x, w):
        for part, rows in _blocks(y, x):
            part.copy_(_multiplied(rows, w))
    else:
        torch.mm(x, w, out=y)


def add_product(y: Tensor, x: Tensor, w: Tensor) -> None:
    """Y += X W, in Y's dtype."""
    if y.dtype != x.dtype:
        y += product(x, w)
    elif _is_onednns(x, w):
        for part, rows in _blocks(y, x):
            part += _multiplied(rows, w)
    else:
        y.addmm_(x, w)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``F.linear``: just that where torch's product is faster, weight or bias get a gradient, autocast is on, or a compiler looks on.

    Args:
        x: ``[..., in]``.
        weight: ``[out, in]``; bias: ``[out]``.

    Returns:
        ``[..., out]``, differentiable once in ``x``.
    """
    if (
        torch.compiler.is_compiling()
        or not _is_frozen(x, weight, bias)
        or not _is_onednns(x, weight.t())
    ):
        return F.linear(x, weight, bias)
    y: Tensor = _FrozenLinear.apply(x, weight, bias)
    return y


class DenseLinear(nn.Linear):
    """A linear layer that stays dense, such as an output head: :func:`linear` multiplies it."""

    @classmethod
    def of(cls, layer: nn.Linear) -> DenseLinear:
        """A layer with the parameters of ``layer``, shared and not copied."""
        dense = cls(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
        dense.weight, dense.bias = layer.weight, layer.bias
        return dense

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


def float32_precision() -> str:
    """``torch.get_float32_matmul_precision()``, of CPUs. That raises once torch's newer settings are used, of which each library has its
    own: then oneDNN's counts.
    """
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:
        theirs: Any = torch.backends.mkldnn  # its types lack what it is given when it is imported
        return "highest" if theirs.matmul.fp32_precision in ("ieee", "none") else "high"


@contextmanager
def matmul_precision(precision: str | None) -> Iterator[None]:
    """In this block products of fp32 numbers are as precise as ``torch.set_float32_matmul_precision`` understands it.

    None leaves them as they are, and where torch's newer settings are used those stay.
    Packed weights follow it on a CPU with AMX (:func:`modulora_core.kernels.cpu.block_choice.slices`).
    """
    try:
        before = torch.get_float32_matmul_precision()
    except RuntimeError:
        precision = None
    if precision is None:
        yield
        return
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _is_frozen(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether no gradient goes to the parameters, and nothing else is asked of torch's own function: a cast, a word about shapes."""
    trains = weight.requires_grad or (bias is not None and bias.requires_grad)
    fits = x.dim() > 1 and x.shape[-1] == weight.shape[1]
    return (
        fits
        and not (trains and torch.is_grad_enabled())
        and not torch.is_autocast_enabled(x.device.type)
    )


class _FrozenLinear(torch.autograd.Function):
    """Nothing is saved that isn't there anyway. Its result is no view: where memory of a view is written to, as a loss does to
    that of logits, autograd would zero as much again for its gradient.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight)
        y = _multiplied(x, weight.t())
        return y if bias is None else y.add_(bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dY: Tensor) -> tuple[Tensor, None, None]:
        (weight,) = ctx.saved_tensors
        dX = product(dY.reshape(-1, dY.shape[-1]), weight)
        return dX.view(*dY.shape[:-1], weight.shape[1]), None, None


def _multiplied(x: Tensor, w: Tensor) -> Tensor:
    """By the operator to which torch's compiler lowers a linear layer; it takes X as ``[..., k]`` and its weight as ``[m, k]``."""
    bound_caches()
    y: Tensor = torch.ops.mkldnn._linear_pointwise.default(x, w.t(), None, "none", [], "")
    return y


def _blocks(y: Tensor, x: Tensor) -> zip[tuple[Tensor, Tensor]]:
    rows = max(LEAST_ROWS, SCRATCH_BYTES // (4 * y.shape[1]))
    return zip(y.split(rows), x.split(rows), strict=True)


def _is_onednns(x: Tensor, w: Tensor) -> bool:
    rows = x.shape[:-1].numel()
    return (
        x.dtype is w.dtype is torch.float32
        and is_plain(x)
        and is_plain(w)
        and x.is_cpu
        and rows * w.numel() >= (LEAST_PRODUCTS_OF_A_ROW if rows == 1 else LEAST_PRODUCTS)
        and x.shape[-1] == len(w)
        # a W with gaps, such as a few columns of a matrix, goes through oneDNN's reference: a thousand times as long
        and (w.is_contiguous() or w.t().is_contiguous())
        and onednn_is_faster()
        and torch._C._get_mkldnn_enabled()
    )


@cache
def bound_caches() -> None:
    """Have oneDNN, and what torch has around it, keep :data:`KEPT_SIZES` products each, before the first of them is made.

    For each size, and so for each number of rows, they keep half a MiB and more, of 1024 sizes by default: with texts of all lengths
    more than the model. Both read their variable of the environment once; what it says already stays.
    """
    for name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
        os.environ.setdefault(name, str(KEPT_SIZES))


@cache
def onednn_is_faster() -> bool:
    """Whether torch multiplies fp32 by MKL, on a processor with AVX-512 on which MKL doesn't use it."""
    libraries = torch.backends.mkldnn, torch.backends.mkl
    return (
        all(library.is_available() for library in libraries)
        and torch.backends.cpu.get_cpu_capability() == "AVX512"
        and "AuthenticAMD" in _processor()
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )


def _processor() -> str:
    """What the system says of it, with its vendor's name as CPUID gives it."""
    described = Path("/proc/cpuinfo")
    return described.read_text() if described.exists() else platform.processor()
