"""The conformance kit over every configuration with a promise."""

from pathlib import Path

import pytest
from modulora_conformance import QuantizerConformance
from modulora_quip_sharp_e8 import SPEC
from modulora_quip_sharp_e8.quantizer import QuIPSharpE8
from modulora_quip_sharp_e8.reference import Options


@pytest.mark.slow
class TestQuIPSharpE8(QuantizerConformance):
    golden = Path(__file__).parent / "golden"

    @pytest.fixture(params=SPEC.promises, ids=lambda promise: promise.title)
    def quantizer(self, request):
        return QuIPSharpE8(Options(**request.param.options))
