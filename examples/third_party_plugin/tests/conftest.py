import pytest
from modulora_conformance.fixtures import generator, plain_torch  # noqa: F401 - for the tests
from modulora_half_quadratic import packing, reference


@pytest.fixture
def by_the_reference():
    """All of Ŵ of a packed weight, fp32, from reference.py and packing.py alone."""

    def dequantize(packed):
        tensors, metadata = packed.tensors, packed.metadata
        codes = packing.unpack(tensors["codes"], metadata["bits"], packed.shape[1])
        s, b = (tensors[name].float() * tensors["unit"] for name in ("scales", "offsets"))
        return reference.dequantize(codes, s, b, metadata["group_size"])

    return dequantize
