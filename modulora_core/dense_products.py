"""Products of dense matrices, multiplied by the faster of torch's libraries.

    product        X W
    put_product    Y  = X W          X : [n, k]   W : [k, m]   Y : [n, m]
    add_product    Y += X W
    linear         X Wᵀ + b of a frozen layer, with its backward  dX = dY W

On x86 torch multiplies fp32 by MKL. On AMD processors with AVX-512, MKL uses AVX2 only; oneDNN,
which torch has too, takes half of the time there. On other processors torch chooses.
``torch.backends.mkldnn.enabled = False`` turns oneDNN off."""

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
"""Multiplications from which choosing a library pays: 16 rows by 256 × 256."""

LEAST_PRODUCTS_OF_A_ROW = 2**23
"""The same for one row, which only reads W: oneDNN is faster from memory, not from a cache."""

SCRATCH_BYTES = 4 * 2**20
"""oneDNN writes into memory of its own, so a part of this size is copied or added at a time."""

LEAST_ROWS = 128
"""Rows of such a part at least: fewer would read W too often."""

CACHED_SIZES = 64
"""Product sizes whose compiled code oneDNN caches: the packed layers of SmolLM2 have 8 in a
step."""


@cache
def has_bfloat16_units() -> bool:
    """Whether this CPU has AVX-512 or AMX instructions for bf16, and torch uses them.

    ``ONEDNN_MAX_CPU_ISA`` may forbid them. Then a bf16 product takes hundreds of times as long.
    """
    capabilities = (torch.cpu._is_avx512_bf16_supported, torch.cpu._is_amx_tile_supported)
    has = any(supported() for supported in capabilities)
    has = has and torch.backends.mkldnn.is_available()
    has = has and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    if has:
        bound_caches()
    return has


@cache
def has_bfloat16_tile_units() -> bool:
    """Whether this CPU has AMX, whose instructions multiply tiles of bf16 matrices."""
    return has_bfloat16_units() and torch.cpu._is_amx_tile_supported()


def compute_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype in which inputs of ``dtype`` are multiplied: fp32 for 16 bits on a CPU without
    units."""
    if device.type != "cpu" or dtype not in (torch.float16, torch.bfloat16):
        return dtype
    return dtype if dtype == torch.bfloat16 and has_bfloat16_units() else torch.float32


def without_autocast(device: torch.device) -> torch.autocast:
    """A block in which autocast is off. The meta device has no autocast."""
    kind = device.type if torch.amp.is_autocast_available(device.type) else "cpu"
    return torch.autocast(kind, enabled=False)


@contextmanager
def one_thread() -> Iterator[None]:
    """Run torch on one thread in this block, since LAPACK's last bits depend on the threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def product(x: Tensor, w: Tensor) -> Tensor:
    """X W, of two matrices of one dtype, in that dtype, without a gradient."""
    return _by_onednn(x, w) if _is_onednns(x, w) else torch.mm(x, w)


def put_product(y: Tensor, x: Tensor, w: Tensor) -> None:
    """Y = X W, rounded to Y's dtype."""
    if y.dtype != x.dtype:
        y.copy_(product(x, w))
    elif _is_onednns(x, w):
        for part, rows in _parts(y, x):
            part.copy_(_by_onednn(rows, w))
    else:
        torch.mm(x, w, out=y)


def add_product(y: Tensor, x: Tensor, w: Tensor) -> None:
    """Y += X W, in Y's dtype."""
    if y.dtype != x.dtype:  # in fp32 where torch can: a part of a sum may overflow in fp16
        wide = x.is_cuda and not torch.version.hip and x.itemsize == 2 and y.dtype == torch.float32
        y += torch.mm(x, w, out_dtype=y.dtype) if wide else product(x, w)
    elif _is_onednns(x, w):
        for part, rows in _parts(y, x):
            part += _by_onednn(rows, w)
    else:
        y.addmm_(x, w)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``F.linear``, by oneDNN where that is faster and only ``x`` gets a gradient.

    Args:
        x: ``[..., in]``.
        weight: ``[out, in]``.
        bias: ``[out]``.

    Returns:
        ``[..., out]``, differentiable once in ``x``.
    """
    trains = weight.requires_grad or (bias is not None and bias.requires_grad)
    if (
        torch.compiler.is_compiling()
        or (trains and torch.is_grad_enabled())
        or torch.is_autocast_enabled(x.device.type)
        or x.dim() < 2
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
        has_bias = layer.bias is not None
        dense = cls(layer.in_features, layer.out_features, has_bias, device="meta")
        dense.weight, dense.bias = layer.weight, layer.bias
        return dense

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


class _FrozenLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight)
        y = _by_onednn(x, weight.t())
        return y if bias is None else y.add_(bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dY: Tensor) -> tuple[Tensor, None, None]:
        (weight,) = ctx.saved_tensors
        dX = product(dY.reshape(-1, dY.shape[-1]), weight)
        return dX.view(*dY.shape[:-1], weight.shape[1]), None, None


@contextmanager
def matmul_precision(precision: str | None) -> Iterator[None]:
    """Set ``torch.set_float32_matmul_precision`` within this block; None changes nothing."""
    try:
        before = torch.get_float32_matmul_precision()
    except RuntimeError:  # the caller uses torch's newer settings
        precision = None
    if precision is None:
        yield
        return
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _by_onednn(x: Tensor, w: Tensor) -> Tensor:
    """``x w`` by the operator to which torch's compiler lowers a linear layer; ``x: [..., k]``."""
    bound_caches()
    y: Tensor = torch.ops.mkldnn._linear_pointwise.default(x, w.t(), None, "none", [], "")
    return y


def _parts(y: Tensor, x: Tensor) -> zip[tuple[Tensor, Tensor]]:
    rows = max(LEAST_ROWS, SCRATCH_BYTES // (4 * y.shape[1]))
    return zip(y.split(rows), x.split(rows), strict=True)


def _is_onednns(x: Tensor, w: Tensor) -> bool:
    rows = x.shape[:-1].numel()
    return (
        x.dtype is w.dtype is torch.float32
        and type(x) in (Tensor, nn.Parameter)  # no FakeTensor or DTensor
        and type(w) in (Tensor, nn.Parameter)
        and x.is_cpu
        and rows * w.numel() >= (LEAST_PRODUCTS_OF_A_ROW if rows == 1 else LEAST_PRODUCTS)
        and x.shape[-1] == len(w)
        # a W with gaps, such as a few columns of a matrix, takes oneDNN a thousand times as long
        and (w.is_contiguous() or w.t().is_contiguous())
        and onednn_is_faster()
        and torch._C._get_mkldnn_enabled()
    )


@cache
def bound_caches() -> None:
    """Bound the caches of oneDNN and of torch's code around it, before the first product.

    They keep half a MiB and more for each size, of 1024 sizes by default: with texts of all lengths
    more than the model. Each reads its environment variable once; a variable that is set stays.
    """
    for name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
        os.environ.setdefault(name, str(CACHED_SIZES))


@cache
def onednn_is_faster() -> bool:
    """Whether this is an AMD processor with AVX-512, and torch would multiply fp32 by MKL."""
    return (
        torch.backends.mkldnn.is_available()
        and torch.backends.mkl.is_available()
        and torch.backends.cpu.get_cpu_capability() == "AVX512"
        and "AuthenticAMD" in _processor()
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    return cpuinfo.read_text() if cpuinfo.exists() else platform.processor()
