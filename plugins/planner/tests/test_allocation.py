"""The knapsack: against all allocations of small problems, and at the sizes of real ones."""

import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from modulora_planner.budget.allocation import Allocation, Offer, allocate

from modulora_core.errors import OptionError

OFFERS = st.lists(
    st.builds(Offer, st.integers(0, 12), st.floats(0, 8, width=16)), min_size=1, max_size=4
)


def total(layers, taken):
    chosen = [offers[i] for offers, i in zip(layers, taken, strict=True)]
    return sum(offer.nbytes for offer in chosen), math.fsum(offer.error for offer in chosen)


@settings(max_examples=100, deadline=None)
@given(st.lists(OFFERS, min_size=1, max_size=4), st.integers(0, 50))
def test_an_allocation_fits_and_the_best_lies_between_its_bound_and_its_error(layers, budget):
    smallest = sum(min(offer.nbytes for offer in offers) for offers in layers)
    if smallest > budget:
        with pytest.raises(OptionError, match=f"at least {smallest} bytes"):
            allocate(layers, budget)
        return
    found = allocate(layers, budget)
    assert (found.nbytes, found.error) == total(layers, found.taken)
    assert found.nbytes <= budget
    every = itertools.product(*(range(len(offers)) for offers in layers))
    sums = [total(layers, taken) for taken in every]
    optimum = min(error for nbytes, error in sums if nbytes <= budget)
    rounding = 1e-9 * (1 + optimum)  # sums of a few numbers below 8, added in another order
    assert found.bound - rounding <= optimum <= found.error + rounding
    errors = [[offer.error for offer in offers] for offers in layers]
    largest_step = max(max(each) - min(each) for each in errors)
    assert found.error - found.bound <= largest_step + rounding


def test_ties_and_offers_inside_of_the_hull():
    inside = [Offer(0, 10.0), Offer(4, 9.0), Offer(10, 0.0)]  # the middle one saves little
    assert allocate([inside], 9) == Allocation((1,), 4, 9.0, 1.0)
    assert allocate([inside], 10) == Allocation((2,), 10, 0.0, 0.0)
    assert allocate([[Offer(4, 1.0), Offer(4, 1.0), Offer(6, 1.0)]], 100).taken == (0,)


def test_a_layer_without_an_offer_and_impossible_numbers_are_refused():
    with pytest.raises(OptionError, match="a layer with none"):
        allocate([[Offer(1, 1.0)], []], 10)
    for nbytes, error in ((-1, 1.0), (1, -1.0), (1, math.nan), (1, math.inf)):
        with pytest.raises(OptionError, match="finite error"):
            Offer(nbytes, error)
