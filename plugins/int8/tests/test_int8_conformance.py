"""The conformance kit over every configuration that the spec makes promises for."""

from pathlib import Path

import pytest
from modulora_conformance import QuantizerConformance
from modulora_int8 import SPEC
from modulora_int8.quantizer import INT8, Options


@pytest.mark.slow
class TestINT8(QuantizerConformance):
    golden = Path(__file__).parent / "golden"

    @pytest.fixture(params=SPEC.promises, ids=lambda promise: promise.title)
    def quantizer(self, request):
        return INT8(Options(**request.param.options))
