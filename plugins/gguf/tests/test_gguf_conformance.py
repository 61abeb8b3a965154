"""The conformance kit over every configuration that the spec makes promises for."""

from pathlib import Path

import pytest
from modulora_conformance import QuantizerConformance
from modulora_gguf import SPEC
from modulora_gguf.quantizer import GGUF, Options


@pytest.mark.slow
class TestGGUF(QuantizerConformance):
    golden = Path(__file__).parent / "golden"

    @pytest.fixture(params=SPEC.promises, ids=lambda promise: promise.title)
    def quantizer(self, request):
        return GGUF(Options(**request.param.options))
