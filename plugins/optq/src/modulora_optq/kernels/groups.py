"""Scales and zeros of a row's groups on the CPU, as fp32, compiled by numba.

The zeros of consecutive groups are in few bytes, in another order (:mod:`modulora_optq.packing`).
A *chunk* is up to 16 groups whose zeros are within 16 bytes of each plane. A kernel loads these
bytes once, and a table names the byte of each group and the first bit of its zero.
"""

from __future__ import annotations

from functools import cache

import numpy as np
from modulora_kernels.cpu import (
    LANES,
    from_half,
    jit,
    load,
    lookup,
    operation,
    splat,
    store,
    to_floats,
)
from numpy.typing import NDArray

from modulora_optq.packing import PLANES, plane_bytes

_FIELDS = 5  # of a chunk


@cache
def chunks_of(groups: int, bits: int) -> NDArray[np.int32]:
    """The chunks of a row of so many groups: int32 ``[chunks, 5, 16]``.

    Field 0 is the first group, the first byte of the low bits, and the first of the third bits.
    Fields 1 and 2 are the byte after that, and the bit, of each group's low bits; 3 and 4 likewise
    of its third bits.
    """
    places, begin = [], 0
    for width in PLANES[bits]:
        part = plane_bytes(groups, width)
        places.append((begin + np.arange(groups) % part, np.arange(groups) // part * width))
        begin += part
    cuts = [0] if groups else []
    for g in range(1, groups):
        is_full = g - cuts[-1] == LANES
        if is_full or any(np.ptp(byte[cuts[-1] : g + 1]) >= LANES for byte, _ in places):
            cuts.append(g)
    chunks = np.zeros((len(cuts), _FIELDS, LANES), np.int32)
    for chunk, first, stop in zip(chunks, cuts, [*cuts, groups][1:], strict=True):
        chunk[0, 0] = first
        for number, (byte, bit) in enumerate(places):
            start = byte[first:stop].min()
            chunk[0, 1 + number] = start
            chunk[1 + 2 * number, : stop - first] = byte[first:stop] - start
            chunk[2 + 2 * number, : stop - first] = bit[first:stop]
    return chunks


@operation(lambda wholes, floats: floats(wholes, floats))
def _as_floats(_context, builder, _kinds, wholes, floats):
    """``(wholes, floats)``: the bits of whole numbers, as a vector of the second one's type."""
    return builder.bitcast(wholes, floats.type)


@operation(lambda floats, wholes: wholes(floats, wholes))
def _as_wholes(_context, builder, _kinds, floats, wholes):
    """``(floats, wholes)``: the bits of fp32 numbers, as a vector of the second one's type."""
    return builder.bitcast(floats, wholes.type)


@jit(borrows=True)
def _chosen(bytes_, at, index):
    """``bytes_[at + index]`` for 16 indices below 16, without a read after the array's end."""
    begin = min(at, bytes_.size - LANES)
    table = _as_floats(load(bytes_, begin), splat(np.float32(0)))
    return _as_wholes(lookup(table, index + (at - begin)), index)


@jit(borrows=True)
def code_at(packed, row, i, n, bits):
    """Code i of a row of n, one at a time, for the ends of arrays."""
    width = 2 if bits == 3 else bits
    part = (n * width + 7) // 8
    code = (np.int32(packed[row, i % part]) >> (i // part * width)) & ((1 << width) - 1)
    if bits == 3:
        high = (n + 7) // 8
        code |= ((np.int32(packed[row, part + i % high]) >> (i // high)) & 1) << 2
    return np.float32(code)


@jit(borrows=True)
def put_scales(scales, s):
    """fp16 numbers of some rows, by their bits, to as many of ``s``, fp32."""
    flat = scales.reshape(scales.size)
    for k in range(flat.size):
        s[k] = from_half(flat[k])


@jit(borrows=True)
def put_zeros(zeros, row, rows, bits, chunks, groups, first, count, z, to, stride):
    """Zeros of groups ``first ...`` of some rows, as fp32, to ``z[to]`` on, a row each ``stride``.

    Up to 16 more numbers before and after them are overwritten.
    """
    if zeros.size >= LANES:
        for c in range(len(chunks)):
            k = chunks[c, 0, 0] - first
            if -LANES < k < count:
                _put_chunk(zeros, row, rows, bits, chunks, c, z, to + k, stride)
        return
    for r in range(rows):
        for k in range(count):
            z[to + r * stride + k] = np.float32(1 << (bits - 1))
            if zeros.size:
                z[to + r * stride + k] = code_at(zeros, row + r, first + k, groups, bits)


@jit(borrows=True)
def _put_chunk(zeros, row, rows, bits, chunks, c, z, to, stride):
    """The 16 zeros of chunk c of some rows."""
    at = c * _FIELDS * LANES
    index, shift = load(chunks, at + LANES), load(chunks, at + 2 * LANES)
    third_index, third_shift = load(chunks, at + 3 * LANES), load(chunks, at + 4 * LANES)
    for r in range(rows):
        begin = (row + r) * zeros.shape[1]
        code = _chosen(zeros, begin + chunks[c, 0, 1], index) >> shift
        if bits == 3:
            third = _chosen(zeros, begin + chunks[c, 0, 2], third_index) >> third_shift
            code = (code & 3) | (third << 2)
        store(z, to + r * stride, to_floats(code & ((1 << bits) - 1)))
