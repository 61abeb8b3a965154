"""Rounds to the nearest point of E8P12 and of E8₁, and a group of columns by BlockLDLQ, by numba.

The search is exact. Write z for x minus the shift of a coset, and v for a point minus the same. The
nearest v has the largest 2 z·v − |v|². Let |v| be one of the 227 vectors of squared norm ≤ 10, all
of {1/2, 3/2, 5/2}⁸ in that ball. Then every rearrangement of it is in the codebook too. So larger
coordinates are where |z| is largest, and signs are the signs of z. If their number has the wrong
parity, the smallest |z| gets the wrong sign. That leaves seven classes to compare, by the number of
3/2 and 5/2. The 29 vectors of squared norm 12 are compared one by one, if a bound allows them.

Scores are fp64, in which z is exact. So the choice is brute force's, except for ties and rounding.
"""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
from modulora_kernels.cpu import jit
from numba import prange

from modulora_quip_sharp_e8 import codebooks

_ROWS = 16  # that a thread takes at once

_E8P = codebooks.absolute_vectors().numpy()
_E81 = codebooks.e81().numpy()
_TRIPLES = np.array(codebooks.norm_twelve(), np.uint8)


def _raised_table() -> Any:
    """Codes of absolute vectors by the coordinates above 1/2; bit 7 is set if their sum is odd.

    The first 256 are by the bits of the coordinates at 3/2. Then ``256 + 8 i + j`` has 5/2 at i,
    and 3/2 at j unless j is i."""
    index = {tuple(vector): a for a, vector in enumerate((_E8P - 0.5).astype(int).tolist())}
    steps = [tuple(mask >> i & 1 for i in range(8)) for mask in range(256)]
    steps += [
        tuple(2 if k == i else int(k == j) for k in range(8)) for i in range(8) for j in range(8)
    ]
    return np.array([index.get(step, 0) << 8 | sum(step) % 2 << 7 for step in steps], np.uint16)


def _e81_tables() -> tuple[Any, Any]:
    """Codes of E8₁: of (±1/2)⁸ by the bits of the negative coordinates; and of ±1 at i and j > i.

    The latter are at ``4 (8 i + j)``, plus 2 if the first is negative, plus 1 if the second is."""
    index = {tuple(point): code for code, point in enumerate(_E81.tolist())}
    by_signs, by_pair = np.zeros(256, np.uint8), np.zeros(256, np.uint8)
    for signs in range(256):
        by_signs[signs] = index.get(tuple(-0.5 if signs >> i & 1 else 0.5 for i in range(8)), 0)
    for (i, j), signs in itertools.product(itertools.combinations(range(8), 2), range(4)):
        pair = {i: 1 - (signs & 2), j: 1 - 2 * (signs & 1)}
        by_pair[4 * (8 * i + j) + signs] = index[tuple(pair.get(k, 0) for k in range(8))]
    return by_signs, by_pair


_RAISED = _raised_table()
_SIGN_BIT = np.array(codebooks.SIGN_BIT)
_SIGNS = np.array(
    [sum((mask >> i & 1) << bit for i, bit in enumerate(_SIGN_BIT)) for mask in range(256)],
    np.uint8,
)  # of a code, by the bits of the negative coordinates
_ODD = _E8P.sum(axis=1).astype(np.int64) % 2
_E81_BY_SIGNS, _E81_BY_PAIR = _e81_tables()
_ORIGIN = int(np.flatnonzero(~_E81.any(axis=1))[0])
_AXES = int(np.flatnonzero(_E81[:, 0] == 2)[0])  # 2e₀; the others follow, then −2e₀ to −2e₆


@jit()
def _bits(z):
    return np.float64(z).view(np.int64)


@jit()
def _key(z, i):
    """|z| with its coordinate's number in its last three bits: sorting keeps them together."""
    return np.int64(_bits(z) & 0x7FFFFFFFFFFFFFF8 | i).view(np.float64)


@jit()
def _coordinate(key):
    return _bits(key) & 7


@jit()
def _sign(z):
    return _bits(z) >> 63 & 1


@jit()
def _parity(bits):
    bits ^= bits >> 4
    bits ^= bits >> 2
    return (bits ^ bits >> 1) & 1


@jit()
def _ordered(a, b):
    return max(a, b), min(a, b)


@jit()
def _sorted(a, b, c, d, e, f, g, h):
    """From the largest to the smallest, by a network of 19 comparisons without branches."""
    a, c = _ordered(a, c)
    b, d = _ordered(b, d)
    e, g = _ordered(e, g)
    f, h = _ordered(f, h)
    a, e = _ordered(a, e)
    b, f = _ordered(b, f)
    c, g = _ordered(c, g)
    d, h = _ordered(d, h)
    a, b = _ordered(a, b)
    c, d = _ordered(c, d)
    e, f = _ordered(e, f)
    g, h = _ordered(g, h)
    c, e = _ordered(c, e)
    d, f = _ordered(d, f)
    b, e = _ordered(b, e)
    d, g = _ordered(d, g)
    b, c = _ordered(b, c)
    d, e = _ordered(d, e)
    f, g = _ordered(f, g)
    return a, b, c, d, e, f, g, h


@jit(borrows=True)
def _norm_twelve(x, shift, flipped):
    """The best of the 29: 2 Σ|z| at its 3/2 minus a wrong sign's cost; its place in ``_RAISED``.

    ``flipped``: one sign must be wrong, at the smallest |z| of a 1/2, whose place comes third. At a
    3/2 it could be cheaper, but a 1/2 there with the right sign is in the ball, and nearer."""
    total = 0.0
    for i in range(8):
        total += abs(x[i] - shift)
    best, raised, wrong = -np.inf, 0, 0
    for t in range(len(_TRIPLES)):
        i, j, k = _TRIPLES[t, 0], _TRIPLES[t, 1], _TRIPLES[t, 2]
        a, b, c = _key(x[i] - shift, i), _key(x[j] - shift, j), _key(x[k] - shift, k)
        score, least = 2 * (total - a - b - c), min(a, b, c)
        if flipped:
            score -= 2 * least
        if score > best:
            best, raised, wrong = score, 255 ^ (1 << i | 1 << j | 1 << k), _coordinate(least)
    return best, raised, wrong


@jit()
def _in_the_ball(a, b, c, d, odd, even):
    """The best class of squared norm ≤ 10: its gain over (1/2)⁸, and its place in ``_RAISED``.

    a to d are the keys of the four largest |z|. ``odd`` and ``even`` are the costs of such a number
    of 3/2. The gain of four 3/2 comes third."""
    first, second = _coordinate(a), _coordinate(b)
    best, raised = -even, 0
    gain, mask = 2 * a - 2, 1 << first
    if gain - odd > best:
        best, raised = gain - odd, mask
    gain, mask = gain + 2 * b - 2, mask | 1 << second
    if gain - even > best:
        best, raised = gain - even, mask
    gain, mask = gain + 2 * c - 2, mask | 1 << _coordinate(c)
    if gain - odd > best:
        best, raised = gain - odd, mask
    gain, mask = gain + 2 * d - 2, mask | 1 << _coordinate(d)
    if gain - even > best:
        best, raised = gain - even, mask
    if 4 * a - 6 - even > best:
        best, raised = 4 * a - 6 - even, 256 + 9 * first
    if 4 * a + 2 * b - 8 - odd > best:
        best, raised = 4 * a + 2 * b - 8 - odd, 256 + 8 * first + second
    return best, raised, gain


@jit(borrows=True)
def _keys(x, shift):
    """The keys of |z| from the largest to the smallest, their sum, and the signs of z as bits."""
    a, b, c, d = x[0] - shift, x[1] - shift, x[2] - shift, x[3] - shift
    e, f, g, h = x[4] - shift, x[5] - shift, x[6] - shift, x[7] - shift
    signs = _sign(a) | _sign(b) << 1 | _sign(c) << 2 | _sign(d) << 3
    signs |= _sign(e) << 4 | _sign(f) << 5 | _sign(g) << 6 | _sign(h) << 7
    keys = _sorted(
        _key(a, 0), _key(b, 1), _key(c, 2), _key(d, 3),
        _key(e, 4), _key(f, 5), _key(g, 6), _key(h, 7),
    )  # fmt: skip
    return keys, signs


@jit(borrows=True)
def _coset(x, shift):
    """The nearest point of one coset: 2 z·v − |v|², and the code without its parity."""
    (a, b, c, d, e, f, g, h), negative = _keys(x, shift)
    signs = np.int64(_SIGNS[negative])
    parity = _parity(signs)
    # an odd number of 3/2 goes with odd signs; otherwise the smallest |z| has the wrong one
    odd, even = (0.0, 2 * h) if parity else (2 * h, 0.0)
    best, raised, four = _in_the_ball(a, b, c, d, odd, even)
    wrong = _coordinate(h)
    if four + 2 * e - 2 - odd > best:
        score, five, at = _norm_twelve(x, shift, parity == 0)
        if score - 10 > best:
            best, raised, wrong = score - 10, five, at
    code: Any = np.int64(_RAISED[raised])
    if (code >> 7 & 1) != parity:
        signs ^= 1 << _SIGN_BIT[wrong]
    return a + b + c + d + e + f + g + h - 2 + best, code ^ signs


@jit(borrows=True)
def nearest_e8p(x):
    """The code, 0 to 65535, of the point of E8P12 that is nearest to ``x``, float ``[8]``."""
    total = 0.0
    for i in range(8):
        total += x[i]
    plus, code_plus = _coset(x, 0.25)
    minus, code_minus = _coset(x, -0.25)
    # |x − v|² of the cosets differ also by 2 · (1/4) Σx, on either side
    return code_plus if plus + 0.5 * total >= minus - 0.5 * total else code_minus ^ 1


@jit(borrows=True)
def nearest_e81(x):
    """The code, 0 to 255, of the point of E8₁ that is nearest to ``x``, float ``[8]``."""
    (a, b, c, d, e, f, g, h), signs = _keys(x, 0.0)
    first, second = _coordinate(a), _coordinate(b)
    pair, half = 2 * (a + b) - 2, a + b + c + d + e + f + g + h - 2
    if _parity(signs):
        half -= 2 * h
    best = 0.0
    code: Any = _ORIGIN
    if pair > best:
        i, j = min(first, second), max(first, second)
        best = pair
        code = np.int64(_E81_BY_PAIR[32 * i + 4 * j + 2 * (signs >> i & 1) + (signs >> j & 1)])
    if half > best:
        wrong = _parity(signs) << _coordinate(h)
        best, code = half, np.int64(_E81_BY_SIGNS[signs ^ wrong])
    missing = first == 7 and signs >> 7  # −2e₇ has no code
    axis = second if missing else first
    if 4 * (b if missing else a) - 4 > best:
        code = _AXES + axis + 8 * (signs >> axis & 1)
    return code


@jit(borrows=True)
def point_e8p(code, out):
    """Write the point of a code of E8P12, 0 to 65535, to ``out``, fp32 ``[8]``."""
    parity = _parity(code & 255)
    signs = code ^ parity ^ (_ODD[code >> 8] << 7)
    shift = np.float32(0.25) - np.float32(0.5) * np.float32(parity)
    for i in range(8):
        value = _E8P[code >> 8, i]
        out[i] = (-value if signs >> _SIGN_BIT[i] & 1 else value) + shift


@jit(borrows=True)
def point_e81(code, out):
    """Write the point of a code of E8₁, 0 to 255, to ``out``, fp32 ``[8]``."""
    for i in range(8):
        out[i] = _E81[code, i]


# --- BlockLDLQ inside of a group of columns --------------------------------------------------


@jit(borrows=True)
def _round(t, scales, residual, o, block, p, q):
    """The code of the point nearest to ``t``; its residual's to ``residual``, if not None.

    ``p`` gets the point, ``q`` is scratch; all are ``[8]``. ``scales`` are the factors of a
    residual before it is rounded and after."""
    code: int = nearest_e8p(t)
    point_e8p(code, p)
    if residual is not None:
        for c in range(8):
            t[c] = (t[c] - p[c]) * scales[0]
        if residual.itemsize == 1:
            residual[o, block] = nearest_e81(t)
            point_e81(residual[o, block], q)
        else:
            second = nearest_e8p(t)
            residual[o, block] = second
            point_e8p(second, q)
        for c in range(8):
            p[c] += q[c] * scales[1]
    return code


@jit(fastmath=("contract",), borrows=True)
def _add_feedback(t, e, P, begin, k):
    """``t += e[begin:] P[begin:, k : k + 8]``."""
    for j in range(begin, e.size):
        for c in range(8):
            t[c] += e[j] * P[j, k + c]


@jit(parallel=True)
def round_group(W, base, P, E, start, lower, scales, codes, residual):
    """Round the blocks of columns ``[start, start + n)`` of W, last one first; E = W − Ŵ.

    ``base`` ``[rows, n]`` is the feedback of other groups' columns, ``P`` ``[n, n]`` of this
    group's, zero from a block to itself. ``lower``: P has blocks below the diagonal only. A thread
    takes a row through the group, so the number of threads changes no bit."""
    rows, n = base.shape
    for piece in prange((rows + _ROWS - 1) // _ROWS):
        t, p, q = np.empty(8, np.float32), np.empty(8, np.float32), np.empty(8, np.float32)
        for o in range(piece * _ROWS, min((piece + 1) * _ROWS, rows)):
            e = E[o, start : start + n]
            for k in range(n - 8, -1, -8):
                for c in range(8):
                    t[c] = W[o, start + k + c] + base[o, k + c]
                _add_feedback(t, e, P, k + 8 if lower else 0, k)
                block = (start + k) // 8
                codes[o, block] = _round(t, scales, residual, o, block, p, q)
                for c in range(8):
                    e[k + c] = W[o, start + k + c] - p[c]
