"""Tests that ``pytest --pyargs modulora_conformance --quantizer NAME`` collects."""

from __future__ import annotations

import pytest

from modulora_conformance.pytest_plugin import Configuration
from modulora_conformance.suite import QuantizerConformance
from modulora_core.registry import create
from modulora_core.spec import Quantizer


class TestQuantizer(QuantizerConformance):
    """Checks the quantizer of the command line, with each set of options that its spec promises."""

    @pytest.fixture
    def quantizer(self, conformance_configuration: Configuration) -> Quantizer:
        return create(conformance_configuration.name, conformance_configuration.options)
