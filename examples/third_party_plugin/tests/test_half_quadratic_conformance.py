"""The conformance kit, for each configuration that the spec makes promises for."""

import pytest
from modulora_conformance import QuantizerConformance
from modulora_half_quadratic import SPEC
from modulora_half_quadratic.quantizer import HalfQuadratic, Options


class TestHalfQuadratic(QuantizerConformance):
    @pytest.fixture(params=SPEC.promises, ids=lambda promise: promise.title)
    def quantizer(self, request):
        return HalfQuadratic(Options(**request.param.options))
