"""Ŵ by the reference alone."""

import pytest
from modulora_conformance.fixtures import generator  # noqa: F401
from modulora_nf4 import packing, reference


@pytest.fixture(scope="session")
def by_the_reference():
    """``by_the_reference(packed)``: all of Ŵ from reference.py alone, fp32 ``[out, in]``."""

    def decode(packed):
        out_features, in_features = packed.shape
        t, size = packed.tensors, packed.metadata["block_size"]
        if packed.metadata["double_quant"]:
            absmax = reference.double_dequantize(t["absmax_codes"], t["nested_absmax"], t["offset"])
        else:
            absmax = t["absmax"]
        q = packing.unpack(t["codes"], 0, out_features * in_features)
        return reference.dequantize(q, absmax, size).reshape(out_features, in_features)

    return decode
