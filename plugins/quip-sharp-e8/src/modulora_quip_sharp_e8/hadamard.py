"""Hadamard matrices: entries ±1, H Hᵀ = K · I. Our own constructions, from the mathematics alone.

    order K                                          construction
    2^j                                              Sylvester: [[1, 1], [1, −1]] to the j-th Kronecker power
    q + 1, q a prime power ≡ 3 mod 4                 Paley I
    2(q + 1), q a prime power ≡ 1 mod 4              Paley II
    92, 116, 156, 172                                Goethals and Seidel, from :data:`SEQUENCES`
    twice one of these                               [[H, H], [H, −H]]

Where several reach an order, the first line that does is taken. That covers 1, 2 and all multiples of 4 below 188, and of the
256 up to 1024 all but 52: 188, 236, 260, 268, 292, 324, 356, 372, 376, 404, ….

**These matrices are part of the packed format.** A checkpoint holds codes in the rotated basis and not the
matrix: another matrix of the same order, equally good, would make noise of it. Never change a construction, an order
of preference or a sequence; the tests hold digests.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from modulora_core.errors import ShapeError
from modulora_quip_sharp_e8.galois import jacobsthal, prime_power

LARGEST_ORDER = 1024
"""The largest K that :func:`decompose` gives: K multiplications for each coordinate must stay cheap. Part of the format too."""

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
"""By n: the signs of four sequences whose periodic autocorrelations sum to zero at every shift but 0, for order 4n.

From our own search: for 23, 29 and 43 symmetric ones (Williamson's), constant on the orbits of a group of multipliers of Z_n;
for 39 from four such of length 13, A, B, C, D: (A, B, C), (−B, A, D), (−C, −D, A), (−D, C, −B), interleaved modulo 3
(Cooper and Wallis's construction, with the simplest T-sequences: (1, 0, 0), (0, 1, 0), (0, 0, 1) and none).
"""


def decompose(n: int) -> int | None:
    """The smallest K ≤ :data:`LARGEST_ORDER` with n = K · 2^j and a Hadamard matrix here; None if there is none.

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
    """The name of the construction that :func:`hadamard` uses for this order; None where it has none."""
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
    """The matrix of this order: int8 ``[order, order]``. It is shared: don't write to it.

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
            f"Hadamard matrix of order {order}: expected 1, 2, or a multiple of 4 that the constructions of Sylvester, "
            "Paley, Goethals and Seidel (92, 116, 156, 172) reach; use the transform of modulora_quip_sharp_e8.transform, "
            "which has one for any dimension"
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
    """I + S with S = [[0, 1ᵀ], [−1, Q]], which is skew because −1 isn't a square."""
    return _bordered(jacobsthal(q), -1) + np.eye(q + 1, dtype=np.int8)


def _paley_ii(q: int) -> NDArray[Any]:
    """C ⊗ [[1, 1], [1, −1]] + I ⊗ [[1, −1], [−1, −1]] with C = [[0, 1ᵀ], [1, Q]], which is symmetric."""
    C = _bordered(jacobsthal(q), 1)
    off, on = np.array([[1, 1], [1, -1]], np.int8), np.array([[1, -1], [-1, -1]], np.int8)
    H: NDArray[Any] = np.kron(C, off) + np.kron(np.eye(q + 1, dtype=np.int8), on)
    return H


def _goethals_seidel(sequences: tuple[str, ...]) -> NDArray[Any]:
    """[[A, BR, CR, DR], [−BR, A, DᵀR, −CᵀR], [−CR, −DᵀR, A, BᵀR], [−DR, CᵀR, −BᵀR, A]]: circulants; R reverses columns."""
    A, B, C, D = (_circulant(signs) for signs in sequences)
    (B, C, D), (E, F, G) = (
        tuple(X[:, ::-1] for X in three) for three in ((B, C, D), (B.T, C.T, D.T))
    )
    H: NDArray[Any] = np.block([[A, B, C, D], [-B, A, G, -F], [-C, -G, A, E], [-D, F, -E, A]])
    return H


def _circulant(sequence: str) -> NDArray[Any]:
    """Entry (i, j) is sign number j − i, counted around the circle."""
    signs = np.array([1 if sign == "+" else -1 for sign in sequence], np.int8)
    i = np.arange(len(signs))
    circulant: NDArray[Any] = signs[i - i[:, None]]
    return circulant
