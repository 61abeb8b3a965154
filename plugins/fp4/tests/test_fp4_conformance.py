"""The conformance kit over every configuration that the spec makes promises for."""

from pathlib import Path

import pytest
from modulora_conformance import QuantizerConformance
from modulora_fp4 import SPEC
from modulora_fp4.quantizer import FP4, Options


@pytest.mark.slow
class TestFP4(QuantizerConformance):
    golden = Path(__file__).parent / "golden"

    @pytest.fixture(params=SPEC.promises, ids=lambda promise: promise.title)
    def quantizer(self, request):
        return FP4(Options(**request.param.options))
