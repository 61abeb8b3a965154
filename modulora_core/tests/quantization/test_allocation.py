"""The knapsack: against all allocations of small problems, and at the sizes of real ones."""

from __future__ import annotations

import itertools
import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modulora_core.errors import OptionError
from modulora_core.quantization.mixed.allocation import Allocation, Offer, allocate

OFFERS = st.lists(
    st.builds(Offer, st.integers(0, 12), st.floats(0, 8, width=16)), min_size=1, max_size=4
)


def total(layers: list[list[Offer]], taken: tuple[int, ...]) -> tuple[int, float]:
    chosen = [offers[i] for offers, i in zip(layers, taken, strict=True)]
    return sum(offer.nbytes for offer in chosen), math.fsum(offer.error for offer in chosen)


def best(layers: list[list[Offer]], budget: int) -> float:
    """The least error of all allocations that fit."""
    every = itertools.product(*(range(len(offers)) for offers in layers))
    return min(
        error for nbytes, error in (total(layers, taken) for taken in every) if nbytes <= budget
    )


def largest_step(layers: list[list[Offer]]) -> float:
    return max(max(o.error for o in offers) - min(o.error for o in offers) for offers in layers)


@settings(max_examples=100, deadline=None)
@given(st.lists(OFFERS, min_size=1, max_size=4), st.integers(0, 50))
def test_an_allocation_fits_and_the_best_lies_between_its_bound_and_its_error(
    layers: list[list[Offer]], budget: int
) -> None:
    smallest = sum(min(offer.nbytes for offer in offers) for offers in layers)
    if smallest > budget:
        with pytest.raises(OptionError, match=f"at least {smallest} bytes"):
            allocate(layers, budget)
        return
    found = allocate(layers, budget)
    assert (found.nbytes, found.error) == total(layers, found.taken)
    assert found.nbytes <= budget
    optimum = best(layers, budget)
    rounding = 1e-9 * (1 + optimum)  # sums of a few numbers below 8, added in another order
    assert found.bound - rounding <= optimum <= found.error + rounding
    assert found.error - found.bound <= largest_step(layers) + rounding


def real_problem(seed: int) -> list[list[Offer]]:
    """210 layers of three shapes with widths of 2 to 4.5, errors that fall by four for each, and no two layers alike."""
    numbers = random.Random(seed)
    layers = []
    for i in range(210):
        weights = (110_592, 331_776, 884_736)[i % 3]
        scale = weights * math.exp(numbers.gauss(-12, 2))
        sizes = (2.05, 2.3, 3.05, 3.3, 4.05, 4.5)
        layers.append(
            [
                Offer(int(weights * bits / 8), scale * 4**-bits * math.exp(numbers.gauss(0, 0.3)))
                for bits in sizes
            ]
        )
    return layers


@pytest.mark.parametrize("bits", [2.2, 3.05, 4.0])
def test_at_real_sizes_the_error_is_within_a_percent_of_the_bound(bits: float) -> None:
    for seed in range(2):
        layers = real_problem(seed)
        weights = sum(offers[0].nbytes for offers in layers) / 2.05 * 8
        budget = int(weights * bits / 8)
        found = allocate(layers, budget)
        assert found.error <= found.bound * 1.01
        assert budget - found.nbytes < 110_592  # less than the smallest step is left


def test_any_uniform_choice_is_beaten_at_its_own_size() -> None:
    layers = real_problem(0)
    for choice in range(6):
        nbytes, error = total(layers, (choice,) * len(layers))
        assert allocate(layers, nbytes).error <= error


def test_an_offer_inside_of_the_hull_is_taken_where_room_is_left() -> None:
    offers = [
        Offer(0, 10.0),
        Offer(4, 9.0),
        Offer(10, 0.0),
    ]  # the middle one buys little for its bytes
    assert allocate([offers], 9) == Allocation((1,), 4, 9.0, 1.0)
    assert allocate([offers], 10) == Allocation((2,), 10, 0.0, 0.0)


def test_of_equal_offers_the_first_is_taken_and_a_larger_one_that_is_no_better_never() -> None:
    assert allocate([[Offer(4, 1.0), Offer(4, 1.0), Offer(6, 1.0)]], 100).taken == (0,)


def test_a_layer_without_an_offer_and_a_number_that_is_none_are_refused() -> None:
    with pytest.raises(OptionError, match="a layer with none"):
        allocate([[Offer(1, 1.0)], []], 10)
    for nbytes, error in ((-1, 1.0), (1, -1.0), (1, math.nan), (1, math.inf)):
        with pytest.raises(OptionError, match="finite error"):
            Offer(nbytes, error)
