"""H_n, the orthogonal transform that spreads weights and activations, for any dimension n ≥ 1.

    H_n = (1/√n) (M_K ⊗ Sylvester_m),   n = K · m,  m a power of two

    M_K   a Hadamard matrix where :func:`modulora_quip_sharp_e8.hadamard.decompose` has one: the randomized Hadamard
          transform of QuIP# (arXiv 2402.04396, section 3), once its input is multiplied by random signs;
          otherwise Hartley's matrix, cas(2πab/K) = cos(2πab/K) + sin(2πab/K), K being the odd part of n: the real form of
          the paper's fallback, the randomized Fourier transform. It is symmetric, and M_K M_Kᵀ = K · I.

Either way all entries of H_n are known in closed form, none is larger than √2/√n in magnitude (1/√n for
Hadamard matrices), and nothing is stored or drawn: the randomness is that of the signs ``before``.
"""

from __future__ import annotations

import math
from functools import cache, lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from modulora_core import kernels
from modulora_core.errors import ShapeError
from modulora_quip_sharp_e8.hadamard import LARGEST_ORDER, decompose, hadamard

_PANEL = 8  # columns of M_K that lie together for the kernel


@torch.no_grad()
def rotate(
    x: Tensor,
    *,
    transpose: bool = False,
    before: Tensor | None = None,
    after: Tensor | None = None,
    in_place: bool = False,
) -> Tensor:
    """``((x ⊙ before) H_n) ⊙ after``, or with H_nᵀ where ``transpose``.

    Args:
        x: ``[..., n]``, any float dtype.
        transpose: whether to multiply by H_nᵀ, which is the inverse.
        before, after: ``[n]``, fp16 or wider, or None.
        in_place: whether ``x`` isn't needed any more: on the CPU the result then takes its memory, where dtype and layout allow.

    Returns:
        ``[..., n]``, a new tensor on the device of ``x`` unless ``in_place``: fp64 for fp64, computed in it, else fp32. Half precision is
        widened before anything is summed.

    A row's bits don't depend on the other rows, nor on the number of threads: on the CPU, and by the kernels for GPUs. Elsewhere that is
    up to the device's matrix product (K > 1) and Fourier transform (odd part of n above 1024).

    Raises:
        ShapeError: ``x`` has no last dimension, or an empty one, or ``before`` or ``after`` doesn't fit it.
    """
    _check(x, before, after)
    n = x.shape[-1]
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    if x.numel() == 0:
        return torch.empty(x.shape, dtype=dtype, device=x.device)
    if dtype == torch.float32:
        turned = _on_gpu(x.detach().reshape(-1, n), transpose, before, after)
        if turned is not None:
            return turned.view(x.shape)
    scale = torch.full((n,), 1 / math.sqrt(n), dtype=dtype, device=x.device)
    if before is not None:
        scale *= before.to(scale)
    after = None if after is None else after.to(scale)
    K, rows = order(n), x.detach().reshape(-1, n)
    cpu = kernels.load("modulora_quip_sharp_e8.cpu_transform", x.device)
    if cpu is None or K > LARGEST_ORDER:
        return _rotate(rows, K, transpose, scale, after).view(x.shape)
    given, rows = rows, rows.to(dtype).contiguous()
    out = torch.empty_like(rows) if rows is given and not in_place else rows
    threads = min(len(rows), torch.get_num_threads())
    scratch = torch.empty(threads, 2, n, dtype=dtype)
    factors = scale, laid_out(n, transpose, dtype), K, scale[:0] if after is None else after
    if threads == 1:  # to wake others costs as much as a row
        kernels.launch(cpu.rotate_rows, rows, *factors, 0, len(rows), scratch[0], out)
    else:
        kernels.launch(cpu.rotate, rows, *factors, scratch, out)
    return out.view(x.shape)


def turn(
    x: NDArray[Any],
    scale: NDArray[Any],
    unit: Any,
    matrix: NDArray[Any],
    K: int,
    after: bool,
    out: NDArray[Any],
) -> None:
    """A rotation of some rows for a caller that has what the kernel reads: see :func:`modulora_quip_sharp_e8.cpu_transform.turn_rows`."""
    cpu: Any = kernels.load("modulora_quip_sharp_e8.cpu_transform", torch.device("cpu"))
    threads = min(len(x), torch.get_num_threads())
    if threads == 1:  # to wake others costs as much as a row
        kernels.run(cpu.turn_rows, x, scale, unit, matrix, K, after, 0, len(x), out)
    else:
        kernels.run(cpu.turn, x, scale, unit, matrix, K, after, threads, out)


def _on_gpu(
    x: Tensor, transpose: bool, before: Tensor | None, after: Tensor | None
) -> Tensor | None:
    """By Triton's kernels; None where they don't run, or not for this dimension."""
    K = order(x.shape[1])
    gpu = kernels.load_triton("modulora_quip_sharp_e8.gpu_transform", x.device)
    if gpu is None or K > LARGEST_ORDER:
        return None
    before, after = (v if v is None else v.to(x.device).contiguous() for v in (before, after))
    turned: Tensor | None = gpu.rotate(x.contiguous(), K, transpose, before, after)
    return turned


def _check(x: Tensor, before: Tensor | None, after: Tensor | None) -> None:
    if x.dim() == 0 or x.shape[-1] == 0 or not x.is_floating_point():
        raise ShapeError(
            f"what is to be rotated: expected a float tensor [..., n] with n >= 1, got {x.dtype} {list(x.shape)}"
        )
    for name, vector in (("before", before), ("after", after)):
        if vector is not None and vector.shape != x.shape[-1:]:
            raise ShapeError(
                f"{name} of a rotation: expected the shape {list(x.shape[-1:])} for rows of {x.shape[-1]}, got {list(vector.shape)}"
            )


@cache
def order(n: int) -> int:
    """K of n = K · m: that of a Hadamard matrix if there is one, else the odd part of n."""
    K = decompose(n)
    return n // (n & -n) if K is None else K


def matrix(n: int) -> Tensor:
    """H_n as a dense matrix, fp64 ``[n, n]``, by its definition: what :func:`rotate` is measured against."""
    sylvester = torch.ones(1, 1, dtype=torch.float64)
    two = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    K = order(n)
    while len(sylvester) < n // K:
        sylvester = torch.kron(two, sylvester)
    return torch.kron(factor(K), sylvester) / math.sqrt(n)


def factor(K: int) -> Tensor:
    """M_K, fp64 ``[K, K]``. It is orthogonal but for a factor √K; Hartley's is symmetric too."""
    if decompose(K) == K:
        return hadamard(K).double()
    a = torch.arange(K)
    angle = (a[:, None] * a % K).double() * (2 * math.pi / K)
    cas: Tensor = angle.cos() + angle.sin()
    return cas


@lru_cache(maxsize=16)
def laid_out(n: int, transpose: bool, dtype: torch.dtype) -> Tensor:
    """M_K, or M_Kᵀ, of a dimension n as the kernel reads it.

    uint8 ``[K / 4 · K]`` for a Hadamard matrix where segments have enough coordinates: the signs of M[4g, b] to M[4g + 3, b] as four bits,
    the first the lowest, 1 for −1, at ``(b − b mod 4) / 4 · K + 4g + b mod 4``. Else the numbers in panels of eight columns, of ``dtype``:
    M[a, b] at ``(b − b mod 8) · K + 8a + b mod 8``.
    """
    K = order(n)
    M = factor(K).T if transpose else factor(K)
    if K == 1:  # not read
        return torch.empty(0, dtype=torch.uint8)
    if n // K >= 16 and decompose(K) == K:
        bits = (M < 0).view(K // 4, 4, K // 4, 4)  # g, a, panel, b
        signs = (bits * torch.tensor([1, 2, 4, 8]).view(1, 4, 1, 1)).sum(1)
        return signs.transpose(0, 1).reshape(-1).to(torch.uint8)
    panels = F.pad(M, (0, -K % _PANEL)).view(K, -1, _PANEL)
    flat: Tensor = panels.transpose(0, 1).reshape(-1).to(dtype)
    return flat


@lru_cache(maxsize=16)
def _placed(K: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return factor(K).to(device, dtype)


def _rotate(x: Tensor, K: int, transpose: bool, scale: Tensor, after: Tensor | None) -> Tensor:
    """The transform of ``x``, ``[rows, n]``, in torch's operations."""
    rows, n = x.shape
    x = (x.to(scale.dtype) * scale).view(rows, K, n // K)
    h = 1
    while h < n // K:
        a, b = x.view(rows, n // (2 * h), 2, h).unbind(2)
        x = torch.stack((a + b, a - b), dim=2).view(rows, K, n // K)
        h *= 2
    if K > LARGEST_ORDER:
        x = _hartley(x)
    elif K > 1:
        M = _placed(K, x.dtype, x.device)
        x = _across(M if transpose else M.T, x)
    x = x.reshape(rows, n)
    return x if after is None else x * after


def _across(M: Tensor, x: Tensor) -> Tensor:
    """``M x[r]`` for all r, ``[rows, K, m]``."""
    if x.device.type != "cpu":
        return torch.matmul(M, x)
    y = torch.empty_like(x)
    with kernels.one_thread():
        for r in range(len(x)):
            # a product's last bits differ with how many rows and threads there are, and with how a row lies in memory
            y[r] = M @ x[r].clone()
    return y


def _hartley(x: Tensor) -> Tensor:
    """Σ_a x[:, a] cas(2πab/K) for all b, ``[rows, K, m]``, K odd, as Re − Im of a Fourier transform over a."""
    if (
        x.device.type == "cpu"
    ):  # numpy's library takes one column after the other: no bits depend on how many
        spectrum: Tensor = torch.from_numpy(np.fft.rfft(x.numpy(), axis=1))
    else:
        spectrum = torch.fft.rfft(x, dim=1)
    real, imaginary = spectrum.real.to(x.dtype), spectrum.imag.to(x.dtype)
    # those beyond K/2 are the conjugates of those below it, in reverse
    return torch.cat((real - imaginary, (real + imaginary)[:, 1:].flip(1)), dim=1)
