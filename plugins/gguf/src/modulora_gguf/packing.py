"""Quantize weights to some types: codes and scales of blocks, and their bytes.

Q4_0, Q4_1, Q5_0, Q5_1 and Q8_0 take the scale from the largest value of a block, to the bit as
``gguf.quants.quantize`` does. Q4_K and Q6_K search for scales. For each part of a block they try a
few steps between codes. Least squares fit the part's scale (and minimum) to the codes. The fit of
the smallest error wins, weighted by H's diagonal where there is calibration data. Then the
parts' scales are rounded to the block's grid, and the codes are chosen again.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from modulora_gguf.bits import half, to_bytes

K_TRIALS = 20
"""Steps that Q4_K and Q6_K try for each part of a block."""


def _half(values: Tensor) -> Tensor:
    """The bytes of fp32 numbers rounded to fp16: uint8 ``[n, 2 · columns]``."""
    return values.to(torch.float16).view(torch.uint8)


def _reciprocal(d: Tensor) -> Tensor:
    return torch.where(d.abs() < 1e-38, torch.zeros_like(d), 1 / d)


def _with_offset(x: Tensor, levels: int) -> tuple[Tensor, Tensor]:
    """The d ``[n, 1]``, and codes from 0 to ``levels - 1``: x ≈ d (code - levels / 2)."""
    magnitude = x.abs()
    is_largest = magnitude == magnitude.amax(1, keepdim=True)
    columns = torch.arange(x.shape[1], device=x.device)
    first = torch.where(is_largest, columns, x.shape[1]).amin(1, keepdim=True)
    d = x.gather(1, first.clamp(max=x.shape[1] - 1)) / -(levels // 2)
    return d, (x * _reciprocal(d) + (levels / 2 + 0.5)).clamp(0, levels - 1).trunc()


def _with_minimum(x: Tensor, levels: int) -> tuple[Tensor, Tensor, Tensor]:
    """The d and m, ``[n, 1]``, and codes from 0 to ``levels - 1``: x ≈ d code + m."""
    low = x.amin(1, keepdim=True)
    d = (x.amax(1, keepdim=True) - low) / (levels - 1)
    return d, low, ((x - low) * _reciprocal(d) + 0.5).clamp(0, levels - 1).trunc()


def q4_0(x: Tensor, _w: Tensor) -> Tensor:
    d, q = _with_offset(x, 16)
    return torch.cat([_half(d), to_bytes(q, 4, 16)], dim=1)


def q4_1(x: Tensor, _w: Tensor) -> Tensor:
    d, m, q = _with_minimum(x, 16)
    return torch.cat([_half(d), _half(m), to_bytes(q, 4, 16)], dim=1)


def q5_0(x: Tensor, _w: Tensor) -> Tensor:
    d, q = _with_offset(x, 32)
    return torch.cat([_half(d), to_bytes(q >= 16, 1), to_bytes(q % 16, 4, 16)], dim=1)


def q5_1(x: Tensor, _w: Tensor) -> Tensor:
    d, m, q = _with_minimum(x, 32)
    return torch.cat([_half(d), _half(m), to_bytes(q >= 16, 1), to_bytes(q % 16, 4, 16)], dim=1)


def q8_0(x: Tensor, _w: Tensor) -> Tensor:
    d = x.abs().amax(1, keepdim=True) / 127
    scaled = x * _reciprocal(d)
    magnitude = scaled.abs()
    whole = magnitude.floor()
    q = scaled.sign() * (whole + (2 * (magnitude - whole)).floor())  # halves away from zero
    return torch.cat([_half(d), q.to(torch.int8).view(torch.uint8)], dim=1)


def _keep_better(best: list[Tensor], error: Tensor, *values: Tensor) -> None:
    """Replace ``best``, an error and values of each part, where ``error`` is smaller."""
    better = error < best[0]
    best[:] = [
        torch.where(better, new, old) for new, old in zip((error, *values), best, strict=True)
    ]


def _affine(x: Tensor, w: Tensor, levels: int) -> tuple[Tensor, Tensor, Tensor]:
    """The s and m ≥ 0, ``[n, parts, 1]``, that make Σ w (x - (s code - m))² small in each part.

    The third result is Σ w code²: by so much the error grows with the square of an error of s.
    """
    low, high = x.amin(2, keepdim=True).clamp(max=0), x.amax(2, keepdim=True)
    sum_w, sum_x = w.sum(2, keepdim=True), (w * x).sum(2, keepdim=True)
    # equal weights below zero have no step: their code is 0
    best = [(w * (x - low).square()).sum(2, keepdim=True), torch.zeros_like(low), -low, sum_w]
    for trial in range(K_TRIALS + 1):
        inverse = (levels - 2 + 2 * trial / K_TRIALS) * _reciprocal(high - low)
        q = ((x - low) * inverse).round_().clamp_(0, levels - 1)
        wq = w * q
        sum_q, sum_qq = wq.sum(2, keepdim=True), (wq * q).sum(2, keepdim=True)
        sum_qx = (wq * x).sum(2, keepdim=True)
        determinant = sum_w * sum_qq - sum_q * sum_q
        s = (sum_w * sum_qx - sum_x * sum_q) * _reciprocal(determinant)
        m = (sum_q * sum_qx - sum_qq * sum_x) * _reciprocal(determinant)
        alone = sum_qx * _reciprocal(sum_qq)
        s, m = torch.where(m > 0, s, alone).clamp(min=0), m.clamp(min=0)
        _keep_better(best, (w * (s * q - m - x).square()).sum(2, keepdim=True), s, m, sum_qq)
    return best[1], best[2], best[3]


def _on_grid(values: Tensor, weights: Tensor, top: int) -> tuple[Tensor, Tensor]:
    """The d ``[n, 1]``, and codes up to ``top`` of ``values`` ≥ 0, ``[n, parts]``, for a small
    Σ weights (values - d code)². The largest value gets another code in each trial."""
    largest = values.amax(1, keepdim=True)
    best = [torch.full_like(largest, torch.inf), largest / top, torch.zeros_like(values)]
    for last in range(top, top // 2, -1):
        codes = (values * (last * _reciprocal(largest))).round()
        wc = weights * codes
        d = (wc * values).sum(1, keepdim=True) * _reciprocal((wc * codes).sum(1, keepdim=True))
        error = (weights * (values - d * codes).square()).sum(1, keepdim=True)
        _keep_better(best, error, d, codes)
    return half(_half(best[1])), best[2]


def q4_k(x: Tensor, w: Tensor) -> Tensor:
    """Blocks with x ≈ d sc q - dmin m, in 8 parts of 32."""
    parts, weights = x.view(-1, 8, 32), w.view(-1, 8, 32)
    s, m, of_s = (value[:, :, 0] for value in _affine(parts, weights, 16))  # [n, 8]
    d, sc = _on_grid(s, of_s, 63)
    dmin, mc = _on_grid(m, weights.sum(2), 63)
    step, minimum = (d * sc)[:, :, None], (dmin * mc)[:, :, None]
    q = ((parts + minimum) * _reciprocal(step)).round().clamp(0, 15)
    a, b = sc.to(torch.uint8), mc.to(torch.uint8)
    low = torch.cat([a[:, :4] | (a[:, 4:] >> 4) << 6, b[:, :4] | (b[:, 4:] >> 4) << 6], dim=1)
    high = (a[:, 4:] & 15) | b[:, 4:] << 4
    return torch.cat([_half(d), _half(dmin), low, high, to_bytes(q.flatten(1), 4, 32)], dim=1)


def _symmetric(x: Tensor, w: Tensor) -> Tensor:
    """The s, ``[n, parts, 1]``, that makes Σ w (x - s code)² small, for codes from -32 to 31."""
    at = x.abs().argmax(2, keepdim=True)
    largest = x.gather(2, at)
    best = [torch.full_like(largest, torch.inf), torch.zeros_like(largest)]
    for trial in range(K_TRIALS + 1):
        inverse = -(31 + 2 * trial / K_TRIALS) * _reciprocal(largest)
        q = (x * inverse).round_().clamp_(-32, 31)
        wq = w * q
        s = (wq * x).sum(2, keepdim=True) * _reciprocal((wq * q).sum(2, keepdim=True))
        _keep_better(best, (w * (s * q - x).square()).sum(2, keepdim=True), s)
    return best[1]


def q6_k(x: Tensor, w: Tensor) -> Tensor:
    """Blocks with x ≈ d sc q, in 16 parts of 16."""
    parts = x.view(-1, 16, 16)
    s = _symmetric(parts, w.view(-1, 16, 16))[:, :, 0]  # [n, 16]
    d = half(_half(s.gather(1, s.abs().argmax(1, keepdim=True)) / -128))
    sc = (s * _reciprocal(d)).round().clamp(-128, 127)
    q = ((parts * _reciprocal(d * sc)[:, :, None]).round().clamp(-32, 31) + 32).flatten(1)
    scales = sc.to(torch.int8).view(torch.uint8)
    return torch.cat([to_bytes(q % 16, 4, 64), to_bytes(q // 16, 2, 32), scales, _half(d)], dim=1)


STEPS = {"Q4_0": 8, "Q4_1": 15, "Q5_0": 16, "Q5_1": 31, "Q8_0": 127, "Q4_K": 15 * 63,
         "Q6_K": 32 * 128}  # fmt: skip
"""The largest value of a block by its fp16 scale d."""

QUANTIZE: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "Q4_0": q4_0, "Q4_1": q4_1, "Q5_0": q5_0, "Q5_1": q5_1, "Q8_0": q8_0, "Q4_K": q4_k,
    "Q6_K": q6_k,
}  # fmt: skip
"""Functions of the types that are packed: of blocks of weights, fp32 ``[n, weights]``, and of the
weights of their errors, likewise; they return uint8 ``[n, bytes]``."""

WEIGHTED = ("Q4_K", "Q6_K")
"""Types whose codes depend on the weights of the errors."""
