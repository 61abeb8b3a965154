"""A measured promise can be pasted, and the kit then finds it kept."""

from modulora_conformance.measure import as_code, measured, packing_memory

from modulora_core.spec import Promise  # noqa: F401  # for eval


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
