"""H_n, the orthogonal matrix that spreads weights and activations, for any dimension n ≥ 1.

    H_n = (1/√n) (M_K ⊗ Sylvester_m)        n = K · m,  m a power of two

M_K is a Hadamard matrix where :func:`modulora_kernels.rotation.decompose` has one. With
random signs before it, H_n is a randomized Hadamard transform (arXiv 2402.04396, section 3).
Otherwise K is the odd part of n, and M_K Hartley's matrix, cas(2πab/K) = cos(2πab/K) + sin(2πab/K).
It is the real form of the paper's fallback, the randomized Fourier transform (appendix A).

No entry of H_n is above √2/√n, or 1/√n with a Hadamard matrix. Nothing is stored or drawn.
"""

from __future__ import annotations

import math
from functools import cache, lru_cache
from typing import Literal

import numpy as np
import torch
from torch import Tensor

import modulora_kernels as kernels
from modulora_core.dense_products import without_autocast
from modulora_core.errors import ShapeError
from modulora_kernels.rotation.hadamard import LARGEST_ORDER, decompose, hadamard

_KERNELS = "modulora_kernels.rotation"


def rotate(
    x: Tensor,
    scale: Tensor | None = None,
    unit: Tensor | None = None,
    *,
    after: bool = False,
    transpose: bool = False,
    in_place: bool = False,
    dtype: torch.dtype | None = None,
    block: int | None = None,
) -> Tensor:
    """``(x ⊙ s) H_n`` with s = unit · scale, or ``(x H_n) ⊙ s`` if ``after``.

    A row's bits do not depend on other rows or on the number of threads. The exception is plain
    torch on a GPU, whose libraries decide.

    Args:
        x: ``[..., n]``, any float dtype. Sums are in fp64 for fp64, else in fp32.
        scale: fp16 ``[n]``, or None for no scale.
        unit: fp32 ``[1]``, or None for 1.
        after: whether the scale comes after the matrix.
        transpose: multiply by H_nᵀ, the inverse.
        in_place: the result may take the memory of ``x``.
        dtype: of the result: fp32, bf16, or fp64 for fp64; by default the dtype of the sums.
        block: None, or a power of two: H_n is then I ⊗ H_block, n / block rotations side by side.

    Raises:
        ShapeError: ``x`` is no float tensor of n ≥ 1 columns, ``scale`` does not fit it, or
            ``block`` is no power of two that divides n.
    """
    if x.dim() == 0 or x.shape[-1] == 0 or not x.is_floating_point():
        raise ShapeError(
            f"rotation: expected a float tensor [..., n] with n >= 1, got {x.dtype} {list(x.shape)}"
        )
    n = x.shape[-1]
    if scale is not None and scale.shape != (n,):
        raise ShapeError(f"scale of a rotation: expected the shape [{n}], got {list(scale.shape)}")
    if block is not None and (block < 1 or block & (block - 1) or n % block):
        raise ShapeError(
            f"block of a rotation: expected a power of two that divides {n}, got {block}"
        )
    computed = torch.float64 if x.dtype == torch.float64 else torch.float32
    dtype = dtype or computed
    rows = x.detach().reshape(-1, n)
    module = kernels.for_device(_KERNELS, x.device)
    turned: Tensor | None = None
    small = order(block or n) <= LARGEST_ORDER
    if module is not None and computed == torch.float32 and len(rows) and small:
        turned = module.rotate(
            rows,
            scale,
            unit,
            after=after,
            transpose=transpose,
            in_place=in_place,
            dtype=dtype,
            block=block,
        )
    if turned is None:
        s = None if scale is None else scale.to(computed)
        s = s if s is None or unit is None else s * unit.to(computed)
        turned = _in_torch(rows.to(computed), s, after, transpose, block).to(dtype)
    return turned if x.dim() == 2 else turned.view(x.shape)


@cache
def order(n: int) -> int:
    """K of n = K · m: the order of a Hadamard matrix if there is one, else the odd part of n."""
    K = decompose(n)
    return n // (n & -n) if K is None else K


def factor(K: int) -> Tensor:
    """M_K, fp64 ``[K, K]``: √K times an orthogonal matrix."""
    if decompose(K) == K:
        return hadamard(K).double()
    a = torch.arange(K, device="cpu")
    angle = (a[:, None] * a % K).double() * (2 * math.pi / K)
    cas: Tensor = angle.cos() + angle.sin()
    return cas


def matrix(n: int, block: int | None = None) -> Tensor:
    """H_n by its definition, dense fp64 ``[n, n]``: the truth for :func:`rotate`."""
    if block is not None:
        return torch.kron(torch.eye(n // block, dtype=torch.float64, device="cpu"), matrix(block))
    sylvester = hadamard(n // order(n)).double()
    return torch.kron(factor(order(n)), sylvester) / math.sqrt(n)


@torch.no_grad()
def _in_torch(
    x: Tensor, s: Tensor | None, after: bool, transpose: bool, block: int | None
) -> Tensor:
    """The rotation of ``x``, ``[rows, n]``, in its dtype, by torch's operations."""
    rows, n = x.shape
    K = order(n) if block is None else n // block
    before = x.new_full((n,), 1 / math.sqrt(block or n))
    x = (x * (before if s is None or after else before * s)).view(rows, K, n // K)
    h = 1
    while h < n // K:
        a, b = x.view(rows, n // (2 * h), 2, h).unbind(2)
        x = torch.stack((a + b, a - b), dim=2).view(rows, K, n // K)
        h *= 2
    if block is not None:
        pass  # the identity's blocks stay apart
    elif K > LARGEST_ORDER:
        x = _hartley(x)
    elif K > 1:
        M = _placed(K, x.dtype, x.device)
        x = _across(M if transpose else M.T, x)
    x = x.reshape(rows, n)
    return x * s if s is not None and after else x


@lru_cache(maxsize=16)
def _placed(K: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return factor(K).to(device, dtype)


def _across(M: Tensor, x: Tensor) -> Tensor:
    """``M x[r]`` for all r, ``[rows, K, m]``."""
    with without_autocast(x.device):
        if x.device.type != "cpu":
            return torch.matmul(M, x)
        y = torch.empty_like(x)
        with kernels.one_thread():  # a product's last bits vary with its rows and threads
            for r in range(len(x)):
                y[r] = M @ x[r].clone()
        return y


def _hartley(x: Tensor) -> Tensor:
    """Σ_a x[:, a] cas(2πab/K) for all b, ``[rows, K, m]``, K odd: Re − Im of Fourier's sums."""
    if x.device.type == "cpu":  # numpy's bits do not depend on the number of columns
        spectrum: Tensor = torch.from_numpy(np.fft.rfft(x.numpy(), axis=1))
    else:
        spectrum = torch.fft.rfft(x, dim=1)
    real, imaginary = spectrum.real.to(x.dtype), spectrum.imag.to(x.dtype)
    # frequencies beyond K/2 are the conjugates of the others, in reverse
    return torch.cat((real - imaginary, (real + imaginary)[:, 1:].flip(1)), dim=1)


def signs(seed: int, n: int, side: Literal["input", "output"]) -> Tensor:
    """Random signs of a rotation's input or output: fp32 ``[n]`` of ±1, the same on every device.

    They are the same forever: no release of numpy may change PCG64's raw numbers.
    """
    stream = np.random.PCG64([seed, n, {"input": 0, "output": 1}[side]])
    bits = np.unpackbits(stream.random_raw(-(-n // 64)).view(np.uint8))[:n]
    return torch.from_numpy(1 - 2 * bits.astype(np.float32))
