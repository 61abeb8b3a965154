"""What ``pytest --pyargs modulora_conformance --quantizer NAME`` collects."""

from __future__ import annotations

import pytest

from modulora_conformance.configurations import Configuration
from modulora_conformance.suite import QuantizerConformance
from modulora_core.registry import create
from modulora_core.spec import Quantizer


class TestQuantizer(QuantizerConformance):
    """The quantizer of the command line, with the options that its spec makes promises for."""

    @pytest.fixture
    def quantizer(self, conformance_configuration: Configuration) -> Quantizer:
        return create(conformance_configuration.name, conformance_configuration.options)
