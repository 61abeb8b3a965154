"""The size of a model that was packed through calibration."""

from __future__ import annotations

import pytest
from modulora_conformance.tiny_model import tiny_model
from modulora_quip_sharp_e8.quantizer import QuIPSharpE8
from modulora_quip_sharp_e8.reference import Options

from modulora_core.checkpoints.checkpoint import open_checkpoint

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.slow]

BITS = (2, 3, 4)


def quantizer(bits):
    return QuIPSharpE8(Options(bits=bits))


@pytest.mark.parametrize("bits", BITS)
def test_a_layer_stores_codes_and_vectors_alone(bits):
    record = open_checkpoint(tiny_model(quantizer(bits)).packed).record
    for _, site in record.items():
        out, columns = site.layout.shape
        assert site.layout.nbytes == out * columns * bits // 8 + 2 * (out + columns) + 4
