"""Allocates a budget of bytes to layers: the multiple-choice knapsack problem.

    minimise Σ_l error[l, c(l)]   subject to   Σ_l bytes[l, c(l)] ≤ budget    c(l): l's offer

Each layer has a few offers, points (bytes, error). The offers on a layer's lower convex hull are
steps: each reduces the error for more bytes, at a falling rate. Taking the steps of all layers in
the order of their rates solves the problem with fractions of steps (Sinha and Zoltners 1979). Its
optimum is a lower bound for any allocation. Whole steps end at most one step above the bound. The
rest of the budget goes to the best offers that still fit.

The result depends on the numbers alone, as equal requests must give equal bytes. A solver for
integer programs gains less than 1 % here, and its choice among ties may change with its version.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from modulora_core.errors import OptionError


@dataclass(frozen=True, slots=True)
class Offer:
    """One way to store a layer.

    Attributes:
        nbytes: the size of the packed layer.
        error: finite and not negative, in any unit.

    Raises:
        OptionError: a number is out of its range.
    """

    nbytes: int
    error: float

    def __post_init__(self) -> None:
        if self.nbytes < 0 or not (math.isfinite(self.error) and self.error >= 0):
            raise OptionError(
                "an offer: expected bytes and a finite error of 0 or more, got "
                f"{self.nbytes} and {self.error}"
            )


@dataclass(frozen=True, slots=True)
class Allocation:
    """An offer for each layer.

    Attributes:
        taken: the index of each layer's offer.
        nbytes: the sum of their bytes; error: the sum of their errors.
        bound: no allocation within the budget has a smaller error.
    """

    taken: tuple[int, ...]
    nbytes: int
    error: float
    bound: float


def allocate(layers: Sequence[Sequence[Offer]], budget: int) -> Allocation:
    """Choose an offer for each layer, within ``budget`` bytes and with a small sum of errors.

    Args:
        layers: the offers of each layer, at least one.

    Raises:
        OptionError: the smallest offers exceed the budget, or a layer has no offer.
    """
    if not all(layers):
        raise OptionError("allocation: expected an offer for every layer, got a layer with none")
    hulls = [_hull(offers) for offers in layers]
    taken = [hull[0] for hull in hulls]
    room = budget - sum(offers[i].nbytes for offers, i in zip(layers, taken, strict=True))
    if room < 0:
        raise OptionError(
            f"budget: expected at least {budget - room} bytes, which the smallest offers take, "
            f"got {budget}"
        )
    bound = sum(offers[i].error for offers, i in zip(layers, taken, strict=True))
    steps = [(-rate, layer, offer) for layer, hull in enumerate(hulls)
             for rate, offer in _steps(layers[layer], hull)]  # fmt: skip
    for negative_rate, layer, offer in sorted(steps, key=lambda step: step[:2]):
        before, after = layers[layer][taken[layer]], layers[layer][offer]
        if after.nbytes - before.nbytes > room:
            bound += negative_rate * room  # the fraction of this step that fits
            break
        taken[layer] = offer
        room -= after.nbytes - before.nbytes
        bound -= before.error - after.error
    _spend(layers, taken, room)
    chosen = [offers[i] for offers, i in zip(layers, taken, strict=True)]
    error = math.fsum(offer.error for offer in chosen)
    nbytes = sum(offer.nbytes for offer in chosen)
    return Allocation(tuple(taken), nbytes, error, min(max(0.0, bound), error))


def _hull(offers: Sequence[Offer]) -> list[int]:
    """The offers on the lower convex hull, from the smallest on, each with a smaller error."""
    hull: list[int] = []
    for i in sorted(range(len(offers)), key=lambda i: (offers[i].nbytes, offers[i].error, i)):
        if hull and offers[i].error >= offers[hull[-1]].error:
            continue
        while len(hull) > 1 and _rate(offers, *hull[-2:]) <= _rate(offers, hull[-2], i):
            hull.pop()
        hull.append(i)
    return hull


def _steps(offers: Sequence[Offer], hull: Sequence[int]) -> Iterator[tuple[float, int]]:
    """The rate of each step, and its offer."""
    for small, large in pairwise(hull):
        yield _rate(offers, small, large), large


def _rate(offers: Sequence[Offer], small: int, large: int) -> float:
    """The error that a byte saves. Two offers of a hull differ in bytes."""
    gain = offers[small].error - offers[large].error
    return gain / (offers[large].nbytes - offers[small].nbytes)


def _spend(layers: Sequence[Sequence[Offer]], taken: list[int], room: int) -> None:
    """Replace offers by better ones that fit into ``room``, the largest gain first."""
    while True:
        best, best_gain = None, 0.0
        for layer, offers in enumerate(layers):
            now = offers[taken[layer]]
            for i, offer in enumerate(offers):
                if offer.nbytes - now.nbytes <= room and now.error - offer.error > best_gain:
                    best, best_gain = (layer, i), now.error - offer.error
        if best is None:
            return
        layer, i = best
        room -= layers[layer][i].nbytes - layers[layer][taken[layer]].nbytes
        taken[layer] = i
