"""Quadratic residues in finite fields: what Paley's matrices are made of.

GF(q), q = pᵏ, is the polynomials over GF(p) modulo an irreducible one of degree k. An element's number is that of its
coefficients read as digits in base p, the constant term lowest. The polynomial is the first irreducible one
in that numbering, so that a field, and what is built from it, is the same everywhere and for ever.
"""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
from numpy.typing import NDArray

Digits = tuple[int, ...]
"""Coefficients, the constant term first."""


def prime_power(q: int) -> tuple[int, int] | None:
    """``(p, k)`` with q = pᵏ and p a prime, or None."""
    if q < 2:
        return None
    p = next((d for d in range(2, int(q**0.5) + 1) if q % d == 0), q)
    k = 0
    while q % p == 0:
        q //= p
        k += 1
    return (p, k) if q == 1 else None


def jacobsthal(q: int) -> NDArray[Any]:
    """Q of order q, int8: Q_ij = χ(i − j), where χ is 1 for squares, −1 for the others, and χ(0) = 0.

    Raises:
        ValueError: q isn't a power of an odd prime.
    """
    field = prime_power(q)
    if field is None or field[0] == 2:
        raise ValueError(f"order of a Jacobsthal matrix: expected a power of an odd prime, got {q}")
    p, k = field
    powers = p ** np.arange(k)
    digits = np.arange(q)[:, None] // powers % p  # [q, k]
    chi = np.full(q, -1, dtype=np.int8)
    modulus = _irreducible(p, k)
    for element in digits.tolist():
        chi[_number(_product(tuple(element), tuple(element), modulus, p), p)] = 1
    chi[0] = 0
    difference = (digits[:, None] - digits[None]) % p  # [q, q, k]
    return chi[difference @ powers]


def _number(digits: Digits, p: int) -> int:
    return sum(d * p**i for i, d in enumerate(digits))


def _remainder(a: Digits, modulus: Digits, p: int) -> Digits:
    """``a`` modulo the monic ``modulus``, as many digits as the latter's degree."""
    left, k = list(a), len(modulus) - 1
    for top in range(len(left) - 1, k - 1, -1):
        factor = left[top]
        for i in range(k + 1):
            left[top - k + i] = (left[top - k + i] - factor * modulus[i]) % p
    return tuple(left[:k])


def _product(a: Digits, b: Digits, modulus: Digits, p: int) -> Digits:
    whole = [0] * (len(a) + len(b) - 1)
    for (i, x), (j, y) in itertools.product(enumerate(a), enumerate(b)):
        whole[i + j] = (whole[i + j] + x * y) % p
    return _remainder(tuple(whole), modulus, p)


def _monic(p: int, degree: int) -> list[Digits]:
    """All monic polynomials of a degree, in order of their numbers."""
    return [(*reversed(lower), 1) for lower in itertools.product(range(p), repeat=degree)]


def _irreducible(p: int, k: int) -> Digits:
    """The first monic polynomial of degree k without a factor of degree k/2 or less."""
    factors = [f for degree in range(1, k // 2 + 1) for f in _monic(p, degree)]
    return next(c for c in _monic(p, k) if all(any(_remainder(c, f, p)) for f in factors))
