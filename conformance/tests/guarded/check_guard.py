"""Subclasses that take checks away, or say why one can't hold. ``tests/test_guard.py`` runs this in a process of its own."""

from __future__ import annotations

from typing import Any

import pytest
from modulora_conformance import QuantizerConformance
from modulora_zoo.healthy import Healthy
from modulora_zoo.identity import LaxOptions


class Given(QuantizerConformance):
    __test__ = False

    @pytest.fixture
    def quantizer(self) -> Any:
        return Healthy()


class TestNothingTaken(Given):
    __test__ = True


class TestOverrides(Given):
    __test__ = True

    def test_the_protocol_is_supported(self) -> None:
        pass


class TestDeletes(Given):
    __test__ = True
    test_options_are_described_and_frozen = None


class TestOverridesTheGuard(Given):
    __test__ = True
    test_the_protocol_is_supported = None

    def test_no_check_is_overridden_or_deleted(self) -> None:
        pass


class TestOverridesWithoutReason(Given):
    __test__ = True

    @pytest.mark.xfail(strict=True)
    def test_the_protocol_is_supported(self) -> None:
        raise AssertionError


class TestOverridesWithoutStrict(Given):
    __test__ = True

    @pytest.mark.xfail(strict=False, reason="sometimes")
    def test_the_protocol_is_supported(self) -> None:
        raise AssertionError


class TestChangesALevel(Given):
    __test__ = True
    level = "L9"


class TestSaysWhy(QuantizerConformance):
    @pytest.fixture
    def quantizer(self) -> Any:
        return LaxOptions()

    @pytest.mark.xfail(
        strict=True, reason="options of old checkpoints have names that it no longer knows"
    )
    def test_unknown_and_malformed_options_are_refused(self, quantizer: Any) -> None:
        super().test_unknown_and_malformed_options_are_refused(quantizer)


class TestSaysWhyWithoutCause(Given):
    __test__ = True

    @pytest.mark.xfail(strict=True, reason="I thought so")
    def test_the_protocol_is_supported(self, quantizer: Any) -> None:
        super().test_the_protocol_is_supported(quantizer)
