"""The conformance kit over every configuration that the spec makes promises for."""

from pathlib import Path

import pytest
from modulora_conformance import QuantizerConformance
from modulora_optq import SPEC
from modulora_optq.options import Options
from modulora_optq.quantizer import OPTQ


@pytest.mark.slow
class TestOPTQ(QuantizerConformance):
    golden = Path(__file__).parent / "golden"

    @pytest.fixture(params=SPEC.promises, ids=lambda promise: promise.title)
    def quantizer(self, request):
        return OPTQ(Options(**request.param.options))
