"""The tensor types of GGUF in plain torch: the truth for the kernels.

A row of a weight is a sequence of blocks. A block has a fixed number of weights and of bytes, and
its own scale. Every function of :data:`DEQUANTIZE` takes blocks, uint8 ``[n, bytes]``, and returns
their weights, fp32 ``[n, weights]``. Symbols are llama.cpp's (ggml-common.h)::

    d, dmin   fp16 scales of a block            qs, ql, qh   codes: all bits, low bits, high bits
    sc, m     scales of its parts, small ints   q            a code as a number

Every step rounds as in the ``gguf`` package (MIT), whose ``gguf.quants.dequantize`` is the oracle.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from torch import Tensor

from modulora_core.packed import PackedWeight
from modulora_gguf import codebooks
from modulora_gguf.bits import bits, floats, half, nibbles, split, words

SCALED = "NVFP4"
"""The type whose packed weights have one more factor."""


def block_of(type: str) -> tuple[int, int]:
    """The weights and the bytes of a block of a type. Raises KeyError if there is no such type."""
    weights, nbytes = GGML_QUANT_SIZES[GGMLQuantizationType[type]]
    return int(weights), int(nbytes)


def dequantize(blocks: Tensor, type: str) -> Tensor:
    """Ŵ of rows: fp32 ``[rows, in]`` from ``blocks``, uint8 ``[rows, row bytes]``."""
    weights, nbytes = block_of(type)
    rows, row_bytes = blocks.shape
    columns = row_bytes // nbytes * weights
    if rows * columns == 0:
        return torch.zeros(rows, columns, dtype=torch.float32, device=blocks.device)
    return DEQUANTIZE[type](blocks.reshape(-1, nbytes)).reshape(rows, columns)


def tile(packed: PackedWeight, rows: tuple[int, int]) -> Tensor:
    """Rows ``[start, stop)`` of a packed weight, fp32 ``[stop - start, in]``."""
    values = dequantize(packed.tensors["blocks"][slice(*rows)], packed.metadata["type"])
    return values * packed.tensors["scale"] if "scale" in packed.tensors else values


def bf16(b: Tensor) -> Tensor:
    return b.contiguous().view(torch.bfloat16).to(torch.float32)


def q4_0(b: Tensor) -> Tensor:
    d, qs = split(b, 2, 16)
    return half(d) * (nibbles(qs, 16) - 8)


def q4_1(b: Tensor) -> Tensor:
    d, m, qs = split(b, 2, 2, 16)
    return half(d) * nibbles(qs, 16) + half(m)


def q5_0(b: Tensor) -> Tensor:
    d, qh, qs = split(b, 2, 4, 16)
    return half(d) * (nibbles(qs, 16) + 16 * bits(qh, 1) - 16)


def q5_1(b: Tensor) -> Tensor:
    d, m, qh, qs = split(b, 2, 2, 4, 16)
    return half(d) * (nibbles(qs, 16) + 16 * bits(qh, 1)) + half(m)


def q8_0(b: Tensor) -> Tensor:
    d, qs = split(b, 2, 32)
    return floats(qs.view(torch.int8)) * half(d)


def q2_k(b: Tensor) -> Tensor:
    scales, qs, d, dmin = split(b, 16, 64, 2, 2)
    dl, ml = half(d) * floats(scales & 15), half(dmin) * floats(scales >> 4)
    q = bits(qs, 2, 32).view(-1, 16, 16)
    return (dl[:, :, None] * q - ml[:, :, None]).flatten(1)


def q3_k(b: Tensor) -> Tensor:
    hmask, qs, scales, d = split(b, 32, 64, 12, 2)
    sc = nibbles(scales[:, :8], 8) + 16 * bits(scales[:, 8:], 2, 4) - 32
    q = bits(qs, 2, 32) + 4 * bits(hmask, 1, 32) - 4  # a set bit of hmask takes nothing away
    return ((half(d) * sc)[:, :, None] * q.view(-1, 16, 16)).flatten(1)


def scales_of_k(scales: Tensor) -> tuple[Tensor, Tensor]:
    """The sc and m of Q4_K and Q5_K, fp32 ``[n, 8]``, from 12 bytes of 6 bits each."""
    low, mins, high = split(scales, 4, 4, 4)
    sc = torch.cat([low & 63, (high & 15) | (low >> 2 & 48)], dim=1)
    m = torch.cat([mins & 63, (high >> 4) | (mins >> 2 & 48)], dim=1)
    return floats(sc), floats(m)


def _affine_k(d: Tensor, dmin: Tensor, scales: Tensor, q: Tensor) -> Tensor:
    sc, m = scales_of_k(scales)
    dl, ml = half(d) * sc, half(dmin) * m
    return (dl[:, :, None] * q.view(-1, 8, 32) - ml[:, :, None]).flatten(1)


def q4_k(b: Tensor) -> Tensor:
    d, dmin, scales, qs = split(b, 2, 2, 12, 128)
    return _affine_k(d, dmin, scales, nibbles(qs, 32))


def q5_k(b: Tensor) -> Tensor:
    d, dmin, scales, qh, qs = split(b, 2, 2, 12, 32, 128)
    return _affine_k(d, dmin, scales, nibbles(qs, 32) + 16 * bits(qh, 1, 32))


def q6_k(b: Tensor) -> Tensor:
    ql, qh, scales, d = split(b, 128, 64, 16, 2)
    q = nibbles(ql, 64) + 16 * bits(qh, 2, 32) - 32
    dl = half(d) * floats(scales.view(torch.int8))
    return (dl[:, :, None] * q.view(-1, 16, 16)).flatten(1)


def tq1_0(b: Tensor) -> Tensor:
    """Five ternary digits a byte: digit i is the top of 3ⁱ times the byte, modulo 256."""
    qs, qh, d = split(b, 48, 4, 2)
    parts = [
        (part[:, None, :] * torch.tensor([3**i for i in range(digits)], device=b.device)[:, None])
        for part, digits in ((qs[:, :32].int(), 5), (qs[:, 32:].int(), 5), (qh.int(), 4))
    ]
    digits = torch.cat([part.flatten(1) for part in parts], dim=1) & 255
    return half(d) * (floats(digits * 3 >> 8) - 1)


def tq2_0(b: Tensor) -> Tensor:
    qs, d = split(b, 64, 2)
    return half(d) * (bits(qs, 2, 32) - 1)


def mxfp4(b: Tensor) -> Tensor:
    """E2M1 values, doubled, times half of a power of two (E8M0)."""
    e, qs = split(b, 1, 16)
    exponent = e.int()
    d = torch.where(exponent < 2, 0x00200000 << exponent.clamp(max=1), (exponent - 1) << 23)
    return d.view(torch.float32) * codebooks.lookup("MXFP4", nibbles(qs, 16))


def nvfp4(b: Tensor) -> Tensor:
    """E2M1 values, doubled, times half of an E4M3 scale for each 16."""
    scales, qs = split(b, 4, 32)
    exponent, fraction = (scales >> 3 & 15).int(), floats(scales & 7)
    normal = (1 + fraction / 8) * torch.ldexp(torch.ones_like(fraction), exponent - 7)
    d = torch.where(exponent == 0, fraction * 2.0**-9, normal) * 0.5
    d = torch.where((scales == 0) | (scales == 0x7F), torch.zeros_like(d), d)
    q = codebooks.lookup("NVFP4", nibbles(qs, 8)).view(-1, 4, 16)
    return (d[:, :, None] * q).flatten(1)


def iq4_nl(b: Tensor) -> Tensor:
    d, qs = split(b, 2, 16)
    return half(d) * codebooks.lookup("IQ4_NL", nibbles(qs, 16))


def iq4_xs(b: Tensor) -> Tensor:
    d, high, low, qs = split(b, 2, 2, 4, 128)
    shifts = torch.arange(0, 16, 2, device=b.device)
    sc = bits(low, 4) + 16 * floats(words(high, 2) >> shifts & 3) - 32
    q = codebooks.lookup("IQ4_NL", nibbles(qs, 16)).view(-1, 8, 32)
    return ((half(d) * sc)[:, :, None] * q).flatten(1)


DEQUANTIZE: dict[str, Callable[[Tensor], Tensor]] = {
    "BF16": bf16, "Q4_0": q4_0, "Q4_1": q4_1, "Q5_0": q5_0, "Q5_1": q5_1, "Q8_0": q8_0,
    "Q2_K": q2_k, "Q3_K": q3_k, "Q4_K": q4_k, "Q5_K": q5_k, "Q6_K": q6_k, "TQ1_0": tq1_0,
    "TQ2_0": tq2_0, "MXFP4": mxfp4, "NVFP4": nvfp4, "IQ4_NL": iq4_nl, "IQ4_XS": iq4_xs,
    "IQ1_S": codebooks.iq1_s, "IQ1_M": codebooks.iq1_m, "IQ2_XXS": codebooks.iq2_xxs,
    "IQ2_XS": codebooks.iq2_xs, "IQ2_S": codebooks.iq2_s, "IQ3_XXS": codebooks.iq3_xxs,
    "IQ3_S": codebooks.iq3_s,
}  # fmt: skip
"""Every type that the ``gguf`` package dequantizes, by its name."""
