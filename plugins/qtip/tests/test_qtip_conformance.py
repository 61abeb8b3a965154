"""The conformance kit over every configuration with a promise."""

from pathlib import Path

import pytest
from modulora_conformance import QuantizerConformance
from modulora_qtip import SPEC
from modulora_qtip.quantizer import QTIP
from modulora_qtip.reference import Options


@pytest.mark.slow
class TestQTIP(QuantizerConformance):
    golden = Path(__file__).parent / "golden"

    @pytest.fixture(params=SPEC.promises, ids=lambda promise: promise.title)
    def quantizer(self, request):
        return QTIP(Options(**request.param.options))
