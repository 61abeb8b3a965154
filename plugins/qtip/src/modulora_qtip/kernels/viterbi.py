"""Viterbi's algorithm on the bitshift trellis on a CPU, sixteen walks at a time, by numba.

E_t[u] is the least error of a walk of t weights whose last state ends in the L − k bits of u. A
state s follows the end s div 2^k, so one fused loop goes from E_t to E_{t+1}::

    E_{t+1}[u] = min_j  E_t[s div 2^k] + (w_t − C[s])²        s = j 2^(L−k) + u,  j < 2^k

With k + ½ bits, odd weights have a bit more than even ones: s div 2^k is by the bits of weight t,
and j and u by those of weight t + 1.

    computes   five operations for sixteen states: expand E_t, subtract, multiply and add, mark,
               minimum
    moves      C and two E through a cache; a byte for each u and t, the choice of j

All walks are compared. A beam would skip ends that are far from the best. Its tests cost more than
they save, until the distortion rises by more than 2 %.

The mark is j, in the last k bits of an error: so the minimum brings its j along. It changes an
error by less than 2^(k − 23) of itself.
"""

from __future__ import annotations

import numpy as np
from llvmlite import ir  # type: ignore[import-untyped]  # comes with numba, without types
from modulora_kernels.cpu import (
    LANES,
    jit,
    load,
    lookup,
    multiply_add,
    operation,
    scratch,
    share,
    splat,
    store,
)
from numba import prange, types

TOGETHER = 4 * LANES
"""Ends that are compared at once: L − k is at least their logarithm."""

_IMPOSSIBLE = np.float32(1e30)
"""The error of a walk that begins with other bits."""

_NEXT = np.arange(2 * LANES, dtype=np.int32)
_SPREAD = np.concatenate([_NEXT >> k for k in range(9)])
"""For k bits a weight: whose end the states s, s + 1, … follow, counted from the end of s."""

_WHOLES, _BYTES = (ir.VectorType(ir.IntType(bits), LANES) for bits in (32, 8))


@operation(lambda a, b: a(a, b))
def _least(_context, builder, _kinds, a, b):
    """``(a, b)``: the smaller number of each lane."""
    return builder.select(builder.fcmp_ordered("<", a, b), a, b)


@operation(lambda a, kept, _j: a(a, kept, kept))
def _marked(_context, builder, _kinds, a, kept, j):
    """``(a, kept, j)``: the bits ``kept`` of numbers, and the bits of j."""
    bits = builder.and_(builder.bitcast(a, _WHOLES), kept)
    return builder.bitcast(builder.or_(bits, j), a.type)


@operation(lambda out, _at, a, kept: types.void(out, types.int64, a, kept))
def _store_marks(context, builder, kinds, out, at, a, kept):
    """``(out, at, a, kept)``: store the marks of numbers, one byte each."""
    marks = builder.and_(builder.bitcast(a, _WHOLES), builder.not_(kept))
    data = context.make_array(kinds[0])(context, builder, out).data
    place = builder.bitcast(builder.gep(data, [at]), _BYTES.as_pointer())
    builder.store(builder.trunc(marks, _BYTES), place, align=1)


@jit(borrows=True)
def _forward(w, first, count, C, new, E, choices):
    """Walk ``count`` weights of the circle ``w`` from ``first`` on; ``E[0]`` has the beginning.

    Args:
        first, count: even.
        new: k of even and of odd weights.
        E: fp32 ``[2, 2^(L−k) + 16]`` for the smaller k, in turn E_t and E_{t+1}.
        choices: uint8 ``[count or more, 2^(L−k)]`` for the smaller k, written.

    Returns:
        the best end.
    """
    width, most = E.shape[1], choices.shape[1]
    for t in range(count):
        k, following = (new[1], new[0]) if t & 1 else new
        ends, half = C.size >> following, 2 * LANES >> k
        low, high = load(_SPREAD, 2 * LANES * k), load(_SPREAD, 2 * LANES * k + LANES)
        zero = low - low
        kept = zero - np.int32(1 << following)
        before, after = (t & 1) * width, (1 - (t & 1)) * width
        x = splat(w[(first + t) % w.size])
        for u in range(0, ends, TOGETHER):
            p = q = r = o = splat(np.float32(np.inf))
            j = zero
            for s in range(u, C.size, ends):
                at = before + (s >> k)
                walks = load(E, at)
                d = load(C, s) - x
                p = _least(_marked(multiply_add(d, d, lookup(walks, low)), kept, j), p)
                d = load(C, s + LANES) - x
                q = _least(_marked(multiply_add(d, d, lookup(walks, high)), kept, j), q)
                walks = load(E, at + half)
                d = load(C, s + 2 * LANES) - x
                r = _least(_marked(multiply_add(d, d, lookup(walks, low)), kept, j), r)
                d = load(C, s + 3 * LANES) - x
                o = _least(_marked(multiply_add(d, d, lookup(walks, high)), kept, j), o)
                j = j + np.int32(1)
            line = t * most + u
            store(E, after + u, p)
            store(E, after + u + LANES, q)
            store(E, after + u + 2 * LANES, r)
            store(E, after + u + 3 * LANES, o)
            _store_marks(choices, line, p, kept)
            _store_marks(choices, line + LANES, q, kept)
            _store_marks(choices, line + 2 * LANES, r, kept)
            _store_marks(choices, line + 3 * LANES, o, kept)
    return np.argmin(E[0, : C.size >> new[0]])


@jit(borrows=True)
def _back(count, size, new, choices, u, states):
    """The walk that ends in ``u``, from its last state to its first. ``size`` is that of C."""
    for t in range(count - 1, -1, -1):
        k, following = (new[1], new[0]) if t & 1 else new
        states[t] = choices[t, u] * (size >> following) + u
        u = states[t] >> k


@jit(borrows=True)
def _walk(w, margin, C, new, E, choices, states):
    """A circular walk: the best over the seam gives the overlap, and the best with it follows."""
    ends = C.size >> new[0]
    E[0, :ends] = 0
    end = _forward(w, w.size - margin, 2 * margin, C, new, E, choices)
    _back(2 * margin, C.size, new, choices, end, states)
    overlap = states[margin - 1] & (ends - 1)
    E[0, :ends] = _IMPOSSIBLE
    E[0, overlap] = 0
    _forward(w, 0, w.size, C, new, E, choices)
    _back(w.size, C.size, new, choices, overlap, states)


@jit(parallel=True)
def walks(threads, w, margin, C, new, states):
    """The circular walks of sequences, whatever the number of threads.

    Args:
        w: fp32 ``[n, T]``.
        margin: weights on each side of the seam that decide on the overlap, even, at most T / 2.
        C: the values of all states, fp32 ``[2^L]``, L ≥ k + 6.
        new: k of even and of odd weights, the smaller one first.
        states: int32 ``[n, T]``, written.
    """
    for index in prange(threads):
        begin, stop = share(index, threads, len(w))
        ends = C.size >> new[0]
        E = scratch(2, ends + LANES, np.float32)
        E[:] = 0
        choices = scratch(w.shape[1], ends, np.uint8)
        for i in range(begin, stop):
            _walk(w[i], margin, C, new, E, choices, states[i])
