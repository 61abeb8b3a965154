"""The test kit for ModuLoRA quantizers.

Subclass :class:`QuantizerConformance`, give the quantizer, and pytest does the rest::

    import pytest
    from modulora_conformance import QuantizerConformance
    from modulora_mine.quantizer import Mine

    class TestMine(QuantizerConformance):
        @pytest.fixture
        def quantizer(self):
            return Mine()

``pytest --pyargs modulora_conformance --quantizer NAME`` and ``modulora conformance NAME`` run the same checks without a file.

Importing this module doesn't import torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from modulora_conformance.suite import QuantizerConformance

__all__ = ["SUITE", "QuantizerConformance"]

SUITE = "2026.11"
"""The version of the suite, CalVer: year and month in which a check was last added or made stricter."""


def __getattr__(name: str) -> Any:
    if name != "QuantizerConformance":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from modulora_conformance.suite import QuantizerConformance

    return QuantizerConformance
