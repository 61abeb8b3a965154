"""A measured promise can be pasted, and the kit then finds it kept."""

import pytest
from modulora_conformance.measure import as_code, measured, packing_memory, rounded_up

from modulora_core.spec import Promise  # noqa: F401  # for eval


@pytest.mark.parametrize(
    ("value", "digits", "expected"),
    [(4.5, 4, 4.5), (3.0078125, 4, 3.008), (0.26001, 2, 0.27), (0.26, 2, 0.26), (1e-9, 2, 1e-9)],
)
def test_numbers_are_rounded_up(value, digits, expected):
    assert rounded_up(value, digits) == expected


def test_measured_promises_are_those_of_the_spec_or_of_the_given_options(zoo):
    (promise,) = measured("zoo-healthy", ["group_size=16"])
    assert promise.options == {"group_size": 16}
    pasted = eval(f"dict({as_code([promise], 1.5)})")
    assert pasted == {"packing_memory": 1.5, "promises": (promise,)}
    (made,), (found,) = zoo.SPECS["Healthy"].promises, measured("zoo-healthy")
    assert found.options == made.options
    assert 0.5 * made.gaussian < found.gaussian <= made.gaussian
    assert 1 <= packing_memory("zoo-healthy") <= 16
    assert 4 < found.bits_per_weight <= made.bits_per_weight
