"""Common types on the CPU, compiled by numba: the values of the reference, bit for bit.

Other types are decoded by :mod:`modulora_gguf.reference`, after one line in the log.

``blocks`` are uint8 ``[out, row bytes]``; each has ``size`` weights in ``nbytes`` bytes.
"""

from __future__ import annotations

import logging
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from modulora_core.kernels.cpu import CPUKernels, from_half, jit, load, on_stack, store, to_floats
from modulora_core.packed import PackedWeight
from modulora_gguf import codebooks, reference

KINDS = {
    name: kind
    for kind, name in enumerate(("Q4_0", "Q4_1", "Q5_0", "Q8_0", "Q4_K", "Q5_K", "Q6_K", "IQ4_XS"))
}
"""The types with kernels, and their numbers."""

_Q4_0, _Q4_1, _Q5_0, _Q8_0, _Q4_K, _Q5_K, _Q6_K, _ = KINDS.values()
_IQ4 = codebooks.lookup("IQ4_NL", torch.arange(16)).numpy()

_FIFTH_BITS = np.arange(256, dtype=np.uint8)[:, None] >> np.arange(8, dtype=np.uint8) << 4 & 16
"""The bits of each byte, as bits of 16."""

_block = on_stack(256, np.float32)
_bits = on_stack(32, np.uint8)


def operands(packed: PackedWeight) -> tuple[Any, ...]:
    """The ``weight`` of the functions below: blocks, kind, weights and bytes of a block."""
    kind = packed.metadata["type"]
    return packed.tensors["blocks"], KINDS[kind], *reference.block_of(kind)


@jit(borrows=True)
def _half(b: Any, at: int) -> Any:
    number = from_half(np.int16(np.uint16(b[at]) | np.uint16(b[at + 1]) << 8))
    return number if abs(number) < np.float32(65536) else np.float32(0)  # as reference.half


@jit(borrows=True)
def _offset_nibbles(b: Any, out: Any) -> None:
    """Q4_0."""
    d, qs = _half(b, 0), load(b, 2)
    store(out, 0, to_floats((qs & 15) - 8) * d)
    store(out, 16, to_floats((qs >> 4) - 8) * d)


@jit(borrows=True)
def _affine_nibbles(b: Any, out: Any) -> None:
    """Q4_1."""
    d, m, qs = _half(b, 0), _half(b, 2), load(b, 4)
    store(out, 0, to_floats(qs & 15) * d + m)
    store(out, 16, to_floats(qs >> 4) * d + m)


@jit(borrows=True)
def _q5_0(b: Any, out: Any) -> None:
    d, qs, high = _half(b, 0), load(b, 6), _bits()
    for byte in range(4):
        for k in range(8):
            high[8 * byte + k] = _FIFTH_BITS[b[2 + byte], k]
    store(out, 0, to_floats(((qs & 15) | load(high, 0)) - 16) * d)
    store(out, 16, to_floats(((qs >> 4) | load(high, 16)) - 16) * d)


@jit(borrows=True)
def _bytes(b: Any, out: Any) -> None:
    """Q8_0."""
    d = _half(b, 0)
    for k in (0, 16):
        codes = load(b, 2 + k)
        store(out, k, to_floats((codes & 127) - (codes & 128)) * d)  # the sign bit counts -128


@jit(borrows=True)
def _affine_k(b: Any, part: int) -> Any:
    """The scale and the minimum of one of the eight parts of Q4_K and Q5_K."""
    if part < 4:
        sc, m = b[4 + part] & 63, b[8 + part] & 63
    else:
        high = b[8 + part]
        sc, m = (high & 15) | (b[part] >> 2 & 48), (high >> 4) | (b[4 + part] >> 2 & 48)
    return _half(b, 0) * np.float32(sc), _half(b, 2) * np.float32(m)


@jit(borrows=True)
def _q4_k(b: Any, out: Any) -> None:
    for part in range(8):
        scale, minimum = _affine_k(b, part)
        at, shift = 16 + 32 * (part >> 1), 4 * (part & 1)
        for k in (0, 16):
            codes = load(b, at + k) >> shift & 15
            store(out, 32 * part + k, to_floats(codes) * scale - minimum)


@jit(borrows=True)
def _q5_k(b: Any, out: Any) -> None:
    for part in range(8):
        scale, minimum = _affine_k(b, part)
        at, shift = 48 + 32 * (part >> 1), 4 * (part & 1)
        for k in (0, 16):
            codes = (load(b, at + k) >> shift & 15) | (load(b, 16 + k) >> part & 1) << 4
            store(out, 32 * part + k, to_floats(codes) * scale - minimum)


@jit(borrows=True)
def _q6_k(b: Any, out: Any) -> None:
    d = _half(b, 208)
    for part in range(16):
        scale = d * np.float32(np.int8(b[192 + part]))
        run = part >> 1  # runs of 32 weights: four share their low bytes, and four their high ones
        low = 64 * (run >> 2) + 32 * (run & 1) + 16 * (part & 1)
        high = 128 + 32 * (run >> 2) + 16 * (part & 1)
        shift, top = 4 * (run >> 1 & 1), 2 * (run & 3)
        codes = (load(b, low) >> shift & 15) | (load(b, high) >> top & 3) << 4
        store(out, 16 * part, to_floats(codes - 32) * scale)


@jit(borrows=True)
def _iq4_xs(b: Any, out: Any) -> None:
    d = _half(b, 0)
    for part in range(8):
        low = np.int32(b[4 + (part >> 1)] >> 4 * (part & 1) & 15)
        high = np.int32(b[2 + (part >> 2)] >> 2 * (part & 3) & 3)
        scale, at = d * np.float32((low | high << 4) - 32), 8 + 16 * part
        for k in range(16):
            out[32 * part + k] = scale * _IQ4[b[at + k] & 15]
            out[32 * part + k + 16] = scale * _IQ4[b[at + k] >> 4]


@jit(borrows=True)
def _decode_block(kind: int, b: Any, out: Any) -> None:
    if kind == _Q4_0:
        _offset_nibbles(b, out)
    elif kind == _Q4_1:
        _affine_nibbles(b, out)
    elif kind == _Q5_0:
        _q5_0(b, out)
    elif kind == _Q8_0:
        _bytes(b, out)
    elif kind == _Q4_K:
        _q4_k(b, out)
    elif kind == _Q5_K:
        _q5_k(b, out)
    elif kind == _Q6_K:
        _q6_k(b, out)
    else:
        _iq4_xs(b, out)


@jit(borrows=True)
def decode(weight: Any, row: int, start: int, columns: int, out: Any) -> None:
    """Columns ``start ...`` of the rows from ``row`` on, for :class:`CPUKernels`."""
    blocks, kind, size, nbytes = weight
    whole, stop = _block(), start + columns
    for r in range(len(out)):
        for block in range(start // size, (stop + size - 1) // size):
            b = blocks[row + r, block * nbytes : (block + 1) * nbytes]
            first = block * size
            if first >= start and first + size <= stop:
                _decode_block(kind, b, out[r, first - start : first - start + size])
            else:
                _decode_block(kind, b, whole)
                for k in range(max(first, start), min(first + size, stop)):
                    out[r, k - start] = whole[k - first]


kernels = CPUKernels(decode, operands)


@cache  # once for each type
def _say(kind: str) -> None:
    logging.getLogger(__name__).warning(
        "gguf: type %s has no kernel yet: plain torch decodes it, some times slower", kind
    )


def tile(packed: PackedWeight, rows: tuple[int, int], dtype: torch.dtype) -> Tensor:
    kind = packed.metadata["type"]
    if kind in KINDS:
        return kernels.tile(packed, rows, dtype)
    if kind != "BF16":  # torch converts it as fast
        _say(kind)
    return reference.dequantize(packed.tensors["blocks"][slice(*rows)], kind).to(dtype)


def product(x: Tensor, packed: PackedWeight, transpose: bool) -> Tensor | None:
    return kernels.product(x, packed, transpose) if packed.metadata["type"] in KINDS else None
