"""The exact nearest point of E8P12 and of E8₁ on the CPU, compiled by numba.

Write z for x minus the coset's 1/4, and v for a point of the coset less the same. The nearest v has the largest 2 z·v − |v|². Where |v|
is one of the 227 vectors of squared norm ≤ 10, which are *all* of {1/2, 3/2, 5/2}⁸ in that ball, any rearrangement of it is in the
codebook as well. So its larger coordinates are where |z| is largest; its signs are those of z, and if their number must be of the other
parity, the least of |z| has the wrong one. What is left to compare are seven classes, by how many coordinates are 3/2 and 5/2. The
29 vectors of squared norm 12 are looked at one by one, and only where a bound that takes any five coordinates for theirs allows it.

z and all scores are fp64, in which z is exact: the choice is the brute force's, but for ties and rounding in fp64.
"""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
from llvmlite import ir  # type: ignore[import-untyped]  # comes with numba, without types
from numba import prange, types
from numba.extending import intrinsic

from modulora_core.kernels import jit
from modulora_quip_sharp_e8 import codebooks

_VECTORS = 1024  # that a thread takes at once

_E8P = codebooks.absolute_vectors().numpy()
_E81 = codebooks.e81().numpy()
_TRIPLES = np.array(codebooks.norm_twelve(), np.uint8)


def _raised_table() -> Any:
    """Codes of absolute vectors, by which coordinates are raised from 1/2; bit 7 is set where their sum is odd.

    The first 256 are by the bits of the coordinates that are 3/2. Then ``256 + 8 i + j``: i is 5/2, and j is 3/2 if it isn't i.
    """
    index = {tuple(vector): a for a, vector in enumerate((_E8P - 0.5).astype(int).tolist())}
    steps = [tuple(mask >> i & 1 for i in range(8)) for mask in range(256)]
    steps += [
        tuple(2 if k == i else int(k == j) for k in range(8)) for i in range(8) for j in range(8)
    ]
    return np.array([index.get(step, 0) << 8 | sum(step) % 2 << 7 for step in steps], np.uint16)


def _e81_tables() -> tuple[Any, Any]:
    """Codes of E8₁: by the bits of the negative coordinates of (±1/2)⁸; and of ±1 at i and ±1 at j > i, by ``4 (8 i + j)`` plus 2 if
    the first is negative and 1 if the second is.
    """
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
_ODD = _E8P.sum(axis=1).astype(np.int64) % 2
_E81_BY_SIGNS, _E81_BY_PAIR = _e81_tables()
_ORIGIN = int(np.flatnonzero(~_E81.any(axis=1))[0])
_AXES = int(np.flatnonzero(_E81[:, 0] == 2)[0])  # 2e₀; the others follow, then −2e₀ to −2e₆


@intrinsic
def _bits(_context: Any, _number: Any) -> Any:
    """The bits of an fp64 number as int64."""

    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], ir.IntType(64))

    return types.int64(types.float64), generate


@intrinsic
def _number(_context: Any, _bits: Any) -> Any:
    """The fp64 number of these bits."""

    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], ir.DoubleType())

    return types.float64(types.int64), generate


@jit()
def _key(z: float, i: int) -> Any:
    """|z| with its coordinate's number in the last three of its 52 bits, where scores are rounded anyway: sorting keeps them together."""
    return _number(_bits(z) & 0x7FFFFFFFFFFFFFF8 | i)


@jit()
def _coordinate(key: float) -> Any:
    return _bits(key) & 7


@jit()
def _sign(z: float) -> Any:
    return _bits(z) >> 63 & 1


@jit()
def _parity(bits: int) -> Any:
    bits ^= bits >> 4
    bits ^= bits >> 2
    return (bits ^ bits >> 1) & 1


@jit()
def _ordered(a: float, b: float) -> Any:
    return max(a, b), min(a, b)


@jit()
def _sorted(a: float, b: float, c: float, d: float, e: float, f: float, g: float, h: float) -> Any:
    """From the largest to the smallest: a sorting network of 19 comparisons, none of which is a branch."""
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
def _norm_twelve(x: Any, shift: float, flipped: bool) -> Any:
    """The best of the 29: twice the sum of |z| at its 3/2, less what a wrong sign costs; its place in ``_RAISED``; the wrong sign's.

    ``flipped``: a sign must be wrong. It is where |z| is least among those at a 1/2. It could be cheaper at one of the 3/2, but
    then a 1/2 in that place, with the right sign, is in the ball and nearer.
    """
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
def _in_the_ball(a: float, b: float, c: float, d: float, odd: float, even: float) -> Any:
    """What the best class of squared norm ≤ 10 adds to the score of (1/2)⁸, its place in ``_RAISED``, and what four 3/2 would add.

    a to d are the keys of the four largest |z|. ``odd`` and ``even`` is what it costs to have such a number of 3/2.
    """
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
def _coset(x: Any, shift: float) -> Any:
    """The nearest point of one coset: 2 z·v − |v|², and the code without its parity."""
    z0, z1, z2, z3 = x[0] - shift, x[1] - shift, x[2] - shift, x[3] - shift
    z4, z5, z6, z7 = x[4] - shift, x[5] - shift, x[6] - shift, x[7] - shift
    signs = _sign(z0) | _sign(z1) << 4 | _sign(z2) << 1 | _sign(z3) << 5
    signs |= _sign(z4) << 2 | _sign(z5) << 6 | _sign(z6) << 3 | _sign(z7) << 7
    parity = _parity(signs)
    a, b, c, d, e, f, g, h = _sorted(
        _key(z0, 0),
        _key(z1, 1),
        _key(z2, 2),
        _key(z3, 3),
        _key(z4, 4),
        _key(z5, 5),
        _key(z6, 6),
        _key(z7, 7),
    )
    # an odd number of 3/2 goes with an odd number of signs; otherwise the least |z|, which is at a 1/2, has the wrong one
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
def nearest_e8p(x: Any) -> Any:
    """The code, 0 to 65535, of the point of E8P12 that is nearest to ``x``, float ``[8]``."""
    total = 0.0
    for i in range(8):
        total += x[i]
    plus, code_plus = _coset(x, 0.25)
    minus, code_minus = _coset(x, -0.25)
    # |x − v|² of the cosets differ also by 2 · (1/4) Σx, on either side
    return code_plus if plus + 0.5 * total >= minus - 0.5 * total else code_minus ^ 1


@jit(borrows=True)
def nearest_e81(x: Any) -> Any:
    """The code, 0 to 255, of the point of E8₁ that is nearest to ``x``, float ``[8]``."""
    z0, z1, z2, z3 = np.float64(x[0]), np.float64(x[1]), np.float64(x[2]), np.float64(x[3])
    z4, z5, z6, z7 = np.float64(x[4]), np.float64(x[5]), np.float64(x[6]), np.float64(x[7])
    signs = _sign(z0) | _sign(z1) << 1 | _sign(z2) << 2 | _sign(z3) << 3
    signs |= _sign(z4) << 4 | _sign(z5) << 5 | _sign(z6) << 6 | _sign(z7) << 7
    a, b, c, d, e, f, g, h = _sorted(
        _key(z0, 0),
        _key(z1, 1),
        _key(z2, 2),
        _key(z3, 3),
        _key(z4, 4),
        _key(z5, 5),
        _key(z6, 6),
        _key(z7, 7),
    )
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
def point_e8p(code: int, out: Any) -> None:
    """The point of a code of E8P12, 0 to 65535, to ``out``, fp32 ``[8]``."""
    parity = _parity(code & 255)
    signs = code ^ parity ^ (_ODD[code >> 8] << 7)
    shift = np.float32(0.25) - np.float32(0.5) * np.float32(parity)
    for i in range(8):
        value = _E8P[code >> 8, i]
        out[i] = (-value if signs >> _SIGN_BIT[i] & 1 else value) + shift


@jit(borrows=True)
def point_e81(code: int, out: Any) -> None:
    """The point of a code of E8₁, 0 to 255, to ``out``, fp32 ``[8]``."""
    for i in range(8):
        out[i] = _E81[code, i]


@jit(parallel=True)
def search_e8p(x: Any, codes: Any) -> None:
    """The nearest code of E8P12 for each row of ``x``, fp32 ``[n, 8]``, to ``codes``, int16 ``[n]``."""
    for piece in prange((len(x) + _VECTORS - 1) // _VECTORS):
        for k in range(piece * _VECTORS, min((piece + 1) * _VECTORS, len(x))):
            codes[k] = np.int16(nearest_e8p(x[k]))


@jit(parallel=True)
def search_e81(x: Any, codes: Any) -> None:
    """The nearest code of E8₁ for each row of ``x``, fp32 ``[n, 8]``, to ``codes``, uint8 ``[n]``."""
    for piece in prange((len(x) + _VECTORS - 1) // _VECTORS):
        for k in range(piece * _VECTORS, min((piece + 1) * _VECTORS, len(x))):
            codes[k] = np.uint8(nearest_e81(x[k]))
