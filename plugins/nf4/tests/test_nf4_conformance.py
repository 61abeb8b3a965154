"""The conformance kit over every configuration that the spec makes promises for."""

from pathlib import Path

import pytest
from modulora_conformance import QuantizerConformance
from modulora_nf4 import SPEC
from modulora_nf4.quantizer import NF4, Options


@pytest.mark.slow
class TestNF4(QuantizerConformance):
    golden = Path(__file__).parent / "golden"

    @pytest.fixture(params=SPEC.promises, ids=lambda promise: promise.title)
    def quantizer(self, request):
        return NF4(Options(**request.param.options))
