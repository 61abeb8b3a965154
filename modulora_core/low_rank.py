"""Products of activations with the factors of a LoRA adapter, whose rank is small; none makes a copy of the activations in memory.

    project        U  = keep(X) Aᵀ          X : [n, d], activations   keep(X) : X, and 0 where it is dropped
    add_expanded   Y += s · keep(U W)       Y : [n, d]                U : [n, r]   W : [r, d]
    gather         D  = Vᵀ keep(X)          D : [r, d]                V : [n, r]

Where X must be cast, or a part of it left out, torch multiplies a copy. On the CPU kernels read bf16 and the mask themselves
(:mod:`modulora_core.kernels.low_rank`); elsewhere a few rows are copied at a time. Sums are in the dtype of the factor.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from modulora_core import kernels
from modulora_core.dense_products import add_product, is_plain, put_product
from modulora_core.tiles import tile_bytes, tile_ranges

CPU_COPY_BYTES = 2**20
"""Of activations that are cast, or multiplied by a dropout mask, at once: a common L2 cache holds them until they are multiplied, which
takes less than half as long as from memory (docs/performance-findings.md)."""

LEAST_ROWS = 16
"""Fewer rows are copied sooner than a kernel is launched."""

MOST_RANK = 32
"""Beyond, a matrix product of torch is about as fast, copies included, and :func:`gather` would hold eight large sums."""


def project(x: Tensor, A: Tensor, keep: Tensor | None = None) -> Tensor:
    """``keep(X) Aᵀ``, ``[n, r]`` in A's dtype.

    Args:
        x: ``[n, d]``, any float dtype.
        A: ``[r, d]``.
        keep: bool ``[n, d]``, what of X counts; None for all of it.
    """
    cpu = _kernels(x, keep, A.dtype, rank=A.shape[0])
    if cpu is not None:
        projected: Tensor = cpu.rows.matmul((x, _mask(keep)), A.detach().contiguous(), x.shape[0])
        return projected.t().contiguous()
    U = A.new_empty(x.shape[0], A.shape[0])
    for rows in row_chunks(x, A.dtype, keep):
        put_product(U[rows], _kept(x, rows, A.dtype, keep), A.t())
    return U


def add_expanded(y: Tensor, U: Tensor, W: Tensor, keep: Tensor | None = None, *, scale: float = 1.0) -> None:
    """``Y += s · keep(U W)`` in place, summed in U's dtype and rounded once.

    Args:
        y: ``[n, d]``, any float dtype.
        U: ``[n, r]``, W: ``[r, d]``, of one dtype.
        keep: as for :func:`project`.
        scale: s.
    """
    cpu = _kernels(y, keep, U.dtype, rank=U.shape[1])
    if cpu is not None:
        padded = F.pad(W.detach(), (0, -W.shape[1] % cpu.LANES)).contiguous()
        kernels.launch(cpu.add_expanded, U * scale, padded, _mask(keep), y)
    elif y.dtype == U.dtype and keep is None:
        y.addmm_(U, W, alpha=scale)
    else:
        for rows in row_chunks(y, U.dtype, keep):
            part = torch.mm(U[rows], W)
            y[rows].add_(part if keep is None else part.where(keep[rows], 0), alpha=scale)


def gather(V: Tensor, x: Tensor, keep: Tensor | None = None) -> Tensor:
    """``Vᵀ keep(X)``, ``[r, d]`` in V's dtype.

    Args:
        V: ``[n, r]``; x, keep: as for :func:`project`.
    """
    cpu = _kernels(x, keep, V.dtype, rank=V.shape[1])
    if cpu is not None:
        rows = V.t().contiguous()
        gathered: Tensor = cpu.rows.matmul((x, _mask(keep)), rows, x.shape[1], transpose=True)
        return gathered
    D = V.new_zeros(V.shape[1], x.shape[1])
    for part in row_chunks(x, V.dtype, keep):
        add_product(D, V[part].t(), _kept(x, part, V.dtype, keep))
    return D


def copy_bytes(device: torch.device) -> int:
    """Bytes of activations that are copied at once."""
    return min(tile_bytes(device), CPU_COPY_BYTES) if device.type == "cpu" else tile_bytes(device)


def row_chunks(x: Tensor, dtype: torch.dtype, keep: Tensor | None = None) -> Iterator[slice]:
    """Slices of rows whose copies in ``dtype`` are small; one slice where no copy is needed, or there is one row."""
    if x.shape[0] == 1 or (x.dtype == dtype and keep is None):
        yield slice(0, x.shape[0])
        return
    for start, stop in tile_ranges(x.shape[0], x.shape[1] * dtype.itemsize, copy_bytes(x.device)):
        yield slice(start, stop)


def _kept(x: Tensor, rows: slice, dtype: torch.dtype, keep: Tensor | None) -> Tensor:
    chunk = x[rows].to(dtype)
    return chunk if keep is None else chunk.where(keep[rows], 0)


def _kernels(x: Tensor, keep: Tensor | None, factor: torch.dtype, rank: int) -> Any:
    """The compiled kernels, where torch would need a copy of ``x`` and they can do without; else None."""
    needed = x.dtype == torch.bfloat16 or keep is not None
    if not needed or factor != torch.float32 or x.dtype not in (torch.float32, torch.bfloat16):
        return None
    if x.shape[0] < LEAST_ROWS or rank > MOST_RANK or not x.is_contiguous() or not is_plain(x):
        return None
    return kernels.load("modulora_core.kernels.low_rank", x.device)


def _mask(keep: Tensor | None) -> Tensor:
    return torch.empty(0, 0, dtype=torch.bool) if keep is None else keep
