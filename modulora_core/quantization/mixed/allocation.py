"""Which layer gets which quantizer, when all of them together may take so many bytes: the multiple-choice knapsack.

    minimise Σ_l error[l, c(l)]    subject to    Σ_l bytes[l, c(l)] ≤ budget          c(l): the offer that layer l takes

Every layer has a few offers, points (bytes, error). Those on the lower convex hull of a layer are steps, each of which buys
less error with more bytes, at a falling rate. Taking the steps of all layers by their rate, best first, solves the
problem in which a step may be taken in part (Sinha and Zoltners 1979): the error where the budget cuts a step is a
lower bound of what any allocation can reach. Whole steps end at most one step's error above it, and what room is left
is spent on whatever offers still fit. With hundreds of layers a step is a small part of the whole, and the bound says how small.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from modulora_core.errors import OptionError


@dataclass(frozen=True, slots=True)
class Offer:
    """What one layer costs with one quantizer.

    Attributes:
        nbytes: of the packed layer.
        error: what is minimised in sum over layers, in any unit; finite and not negative.

    Raises:
        OptionError: a number is negative, or the error isn't finite.
    """

    nbytes: int
    error: float

    def __post_init__(self) -> None:
        if self.nbytes < 0 or not (math.isfinite(self.error) and self.error >= 0):
            raise OptionError(
                f"an offer: expected bytes and a finite error of 0 or more, got {self.nbytes} and {self.error}"
            )


@dataclass(frozen=True, slots=True)
class Allocation:
    """What :func:`allocate` found.

    Attributes:
        taken: for each layer the index of its offer.
        nbytes: of all layers.
        error: of all layers.
        bound: no allocation within the budget has an error below this.
    """

    taken: tuple[int, ...]
    nbytes: int
    error: float
    bound: float


@dataclass(frozen=True, slots=True)
class _Step:
    """From one offer of a layer's hull to the next."""

    layer: int
    offer: int
    nbytes: int
    gain: float

    @property
    def rate(self) -> float:
        return self.gain / self.nbytes


def allocate(layers: Sequence[Sequence[Offer]], budget: int) -> Allocation:
    """An offer for each layer, so that the bytes fit and the error is small.

    Args:
        layers: the offers of each layer, one or more.
        budget: for the bytes of all layers.

    Raises:
        OptionError: even the smallest offers don't fit, or a layer has no offer.
    """
    if not all(layers):
        raise OptionError("allocation: expected an offer for every layer, got a layer with none")
    hulls = [_hull(offers) for offers in layers]
    taken = [hull[0] for hull in hulls]
    room = budget - sum(offers[i].nbytes for offers, i in zip(layers, taken, strict=True))
    if room < 0:
        raise OptionError(
            f"budget: expected at least {budget - room} bytes, which the smallest offers take, got {budget}"
        )
    bound = error = sum(offers[i].error for offers, i in zip(layers, taken, strict=True))
    steps = sorted(
        (s for i, hull in enumerate(hulls) for s in _steps(i, layers[i], hull)),
        key=lambda s: (-s.rate, s.layer),
    )
    for step in steps:
        if step.nbytes > room:
            bound -= step.rate * room  # the part of this step that fits
            break
        taken[step.layer] = step.offer
        room -= step.nbytes
        bound = error = error - step.gain
    _spend(layers, taken, room)
    chosen = [offers[i] for offers, i in zip(layers, taken, strict=True)]
    error = math.fsum(offer.error for offer in chosen)
    return Allocation(
        tuple(taken), sum(offer.nbytes for offer in chosen), error, min(max(0.0, bound), error)
    )


def _hull(offers: Sequence[Offer]) -> list[int]:
    """Indices of the lower convex hull, from the smallest offer on, each larger and with less error than the one before."""
    hull: list[int] = []
    for i in sorted(range(len(offers)), key=lambda i: (offers[i].nbytes, offers[i].error, i)):
        if hull and offers[i].error >= offers[hull[-1]].error:
            continue
        while len(hull) > 1 and _rate(offers[hull[-2]], offers[hull[-1]]) <= _rate(
            offers[hull[-2]], offers[i]
        ):
            hull.pop()
        hull.append(i)
    return hull


def _rate(small: Offer, large: Offer) -> float:
    """Error bought by a byte. Offers of a hull differ in bytes: of those of one size the best is there."""
    return (small.error - large.error) / (large.nbytes - small.nbytes)


def _steps(layer: int, offers: Sequence[Offer], hull: Sequence[int]) -> Iterator[_Step]:
    for before, after in pairwise(hull):
        small, large = offers[before], offers[after]
        yield _Step(layer, after, large.nbytes - small.nbytes, small.error - large.error)


def _spend(layers: Sequence[Sequence[Offer]], taken: list[int], room: int) -> None:
    """Exchange offers for better ones, the largest gain first, while some fit into ``room``."""
    while True:
        best: tuple[float, int, int] | None = None
        for layer, offers in enumerate(layers):
            now = offers[taken[layer]]
            for i, offer in enumerate(offers):
                gain = now.error - offer.error
                if offer.nbytes - now.nbytes <= room and gain > (0.0 if best is None else best[0]):
                    best = (gain, layer, i)
        if best is None:
            return
        _, layer, i = best
        room -= layers[layer][i].nbytes - layers[layer][taken[layer]].nbytes
        taken[layer] = i
