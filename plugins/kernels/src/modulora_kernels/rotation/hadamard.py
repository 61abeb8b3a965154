"""Hadamard matrices: entries ±1, H Hᵀ = K · I. Our own constructions, from mathematics alone.

    order K                                          construction
    2^j                                              Sylvester: powers of [[1, 1], [1, −1]]
    q + 1, q a prime power ≡ 3 mod 4                 Paley I
    2(q + 1), q a prime power ≡ 1 mod 4              Paley II
    92, 116, 156, 172                                Goethals and Seidel, from :data:`SEQUENCES`
    twice one of these                               [[H, H], [H, −H]]

The first line that reaches an order counts. Together they reach 1, 2 and all multiples of 4 below
188, and 204 of the 256 multiples of 4 up to 1024.

**These matrices are part of the packed format.** A checkpoint holds codes in the rotated basis and
no matrix. Another matrix of the same order, equally good, would turn its weights into noise.
Never change a construction, an order of preference or a sequence; tests hold digests.

Paley's matrices are made of squares in finite fields. GF(q), q = pᵏ, is the polynomials over GF(p)
modulo the first irreducible one of degree k. An element's number has its coefficients as digits in
base p, the constant term lowest; "first" is by that number.
"""

from __future__ import annotations

import itertools
from functools import cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from modulora_core.errors import ShapeError

LARGEST_ORDER = 1024
"""The largest K of :func:`decompose`: K multiplications for each number must stay cheap.

It is part of the format."""

SEQUENCES: dict[int, tuple[str, str, str, str]] = {
    23: (
        "++-+-++-+--++--+-++-+-+",
        "+-+++++---+--+---+++++-",
        "+--++---+-+--+-+---++--",
        "+---+++++++--+++++++---",
    ),
    29: (
        "+-+---+++++--+--+--+++++---+-",
        "+-----+++-++-+--+-++-+++-----",
        "+-+--++--++++-++-++++--++--+-",
        "+++++--+++-+-+--+-+-+++--++++",
    ),
    39: (
        "+++++-+---++-+--+++--+++-++--+---+-++--",
        "------++--+--+-+++++-+--+-+----+-+++---",
        "-+---++++-+-+---+-++++-+-+++++-++++--+-",
        "--+++++-+-++++-++-+-+++-+--++---++--++-",
    ),
    43: (
        "+--++----+-+---+--++++++++--+---+-+----++--",
        "+--+++--+-+--+-+++++-++-+++++-+--+-+--+++--",
        "+-+-+----++++-++++-++--++-++++-++++----+-+-",
        "++-+--++-+++----+++-++++-+++----+++-++--+-+",
    ),
}
"""By n, for order 4n: four sequences whose periodic autocorrelations sum to 0 except at shift 0.

From our own search. For 23, 29 and 43 they are symmetric (Williamson's) and constant on the orbits
of a group of multipliers of Z_n. For 39 they come from four such of length 13, A, B, C, D.
Cooper and Wallis's construction, with the T-sequences (1, 0, 0), (0, 1, 0), (0, 0, 1), gives::

    (A, B, C), (−B, A, D), (−C, −D, A), (−D, C, −B), interleaved modulo 3
"""


def decompose(n: int) -> int | None:
    """The smallest K ≤ :data:`LARGEST_ORDER` with n = K · 2^j and a Hadamard matrix here, or None.

    For n ≥ 1: 1 for powers of two, else the odd part of n times 4, or 8, ….
    """
    K = n // (n & -n)
    while n % K == 0 and K <= LARGEST_ORDER:
        if construction(K) is not None:
            return K
        K *= 2
    return None


@cache
def construction(order: int) -> str | None:
    """The name of the construction for :func:`hadamard` of this order; None if there is none."""
    if order >= 1 and order & (order - 1) == 0:
        return "Sylvester"
    if order % 4 or order < 4:
        return None
    if prime_power(order - 1) is not None:
        return "Paley I"
    if order // 2 % 4 == 2 and prime_power(order // 2 - 1) is not None:
        return "Paley II"
    if order // 4 in SEQUENCES:
        return "Goethals-Seidel"
    return None if construction(order // 2) is None else "doubling"


@cache
def hadamard(order: int) -> Tensor:
    """The matrix of this order: int8 ``[order, order]``, shared: do not write to it.

    Raises:
        ShapeError: no construction here reaches this order.
    """
    name = construction(order)
    if name == "Sylvester":
        H = np.ones((1, 1), np.int8)
        while len(H) < order:
            H = _doubled(H)
    elif name == "Paley I":
        H = _paley_i(order - 1)
    elif name == "Paley II":
        H = _paley_ii(order // 2 - 1)
    elif name == "Goethals-Seidel":
        H = _goethals_seidel(SEQUENCES[order // 4])
    elif name == "doubling":
        H = _doubled(hadamard(order // 2).numpy())
    else:
        raise ShapeError(
            f"Hadamard matrix of order {order}: expected 1, 2, or a multiple of 4 that a "
            "construction reaches; modulora_kernels.rotation rotates any dimension"
        )
    return torch.from_numpy(np.ascontiguousarray(H))


def _doubled(H: NDArray[Any]) -> NDArray[Any]:
    doubled: NDArray[Any] = np.block([[H, H], [H, -H]])
    return doubled


def _bordered(Q: NDArray[Any], left: int) -> NDArray[Any]:
    """[[0, 1ᵀ], [left · 1, Q]]."""
    C = np.ones((len(Q) + 1, len(Q) + 1), np.int8)
    C[0, 0], C[1:, 0], C[1:, 1:] = 0, left, Q
    return C


def _paley_i(q: int) -> NDArray[Any]:
    """I + S with S = [[0, 1ᵀ], [−1, Q]], which is skew because −1 is no square."""
    return _bordered(jacobsthal(q), -1) + np.eye(q + 1, dtype=np.int8)


def _paley_ii(q: int) -> NDArray[Any]:
    """C ⊗ [[1, 1], [1, −1]] + I ⊗ [[1, −1], [−1, −1]] with C = [[0, 1ᵀ], [1, Q]], symmetric."""
    C = _bordered(jacobsthal(q), 1)
    off, on = np.array([[1, 1], [1, -1]], np.int8), np.array([[1, -1], [-1, -1]], np.int8)
    H: NDArray[Any] = np.kron(C, off) + np.kron(np.eye(q + 1, dtype=np.int8), on)
    return H


def _goethals_seidel(sequences: tuple[str, ...]) -> NDArray[Any]:
    """Circulants A, B, C, D in Goethals and Seidel's array; R reverses the columns:

    [[A, BR, CR, DR], [−BR, A, DᵀR, −CᵀR], [−CR, −DᵀR, A, BᵀR], [−DR, CᵀR, −BᵀR, A]]
    """
    A, B, C, D = (_circulant(signs) for signs in sequences)
    (B, C, D), (E, F, G) = (
        tuple(X[:, ::-1] for X in three) for three in ((B, C, D), (B.T, C.T, D.T))
    )
    H: NDArray[Any] = np.block([[A, B, C, D], [-B, A, G, -F], [-C, -G, A, E], [-D, F, -E, A]])
    return H


def _circulant(sequence: str) -> NDArray[Any]:
    """Entry (i, j) is the sign at j − i, counted around the circle."""
    signs = np.array([1 if sign == "+" else -1 for sign in sequence], np.int8)
    i = np.arange(len(signs))
    circulant: NDArray[Any] = signs[i - i[:, None]]
    return circulant


# --- finite fields ---------------------------------------------------------------------------

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
    """Q of order q, int8: Q_ij = χ(i − j); χ is 1 for squares, −1 for others, and χ(0) = 0.

    Raises:
        ValueError: q is no power of an odd prime.
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
        square = _product(tuple(element), tuple(element), modulus, p)
        chi[sum(digit * p**i for i, digit in enumerate(square))] = 1
    chi[0] = 0
    difference = (digits[:, None] - digits[None]) % p  # [q, q, k]
    return chi[difference @ powers]


def _remainder(a: Digits, modulus: Digits, p: int) -> Digits:
    """``a`` modulo the monic ``modulus``, as many digits as the modulus has degrees."""
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
    """All monic polynomials of a degree, by their numbers."""
    return [(*reversed(lower), 1) for lower in itertools.product(range(p), repeat=degree)]


def _irreducible(p: int, k: int) -> Digits:
    """The first monic polynomial of degree k without a factor of degree k/2 or less."""
    factors = [f for degree in range(1, k // 2 + 1) for f in _monic(p, degree)]
    return next(c for c in _monic(p, k) if all(any(_remainder(c, f, p)) for f in factors))
