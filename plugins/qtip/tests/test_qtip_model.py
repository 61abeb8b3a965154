"""The size of a model that was packed through calibration."""

from __future__ import annotations

import pytest
from modulora_conformance.tiny_model import tiny_model
from modulora_qtip.quantizer import QTIP
from modulora_qtip.reference import Options

from modulora_core.checkpoints.checkpoint import open_checkpoint

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.slow]

BITS = (2, 3, 4)


def quantizer(bits):
    return QTIP(Options(bits=bits, states=10))


@pytest.mark.parametrize("bits", BITS)
def test_a_layer_stores_walks_and_vectors_alone(bits):
    record = open_checkpoint(tiny_model(quantizer(bits)).packed).record
    for _, site in record.items():
        out, columns = site.layout.shape
        tiles = -(-out // 16) * -(-columns // 16)
        assert site.layout.nbytes == tiles * 32 * bits + 2 * (out + columns) + 4
