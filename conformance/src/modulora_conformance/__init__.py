"""Tests whether a ModuLoRA quantizer does what its spec promises.

Subclass :class:`QuantizerConformance` in a test file, and give it the quantizer::

    import pytest
    from modulora_conformance import QuantizerConformance
    from modulora_mine.quantizer import Mine

    class TestMine(QuantizerConformance):
        @pytest.fixture
        def quantizer(self):
            return Mine()

``modulora conformance NAME`` and ``pytest --pyargs modulora_conformance --quantizer NAME`` run the
same checks without a test file. Importing this module does not import torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from modulora_conformance.suite import QuantizerConformance

__all__ = ["SUITE", "QuantizerConformance"]

SUITE = "2026.11"
"""The version of the suite: year and month in which a check was last added or made stricter."""


def __getattr__(name: str) -> Any:
    if name != "QuantizerConformance":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from modulora_conformance.suite import QuantizerConformance

    return QuantizerConformance
