"""The umbrella: every level in one class."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import pytest

from modulora_conformance.checks import guard
from modulora_conformance.devices import Devices
from modulora_conformance.golden import Golden
from modulora_conformance.gradients import Gradients
from modulora_conformance.identity import Identity
from modulora_conformance.lookups import Lookups
from modulora_conformance.memory import Memory
from modulora_conformance.packing import Packing
from modulora_conformance.persistence import Persistence
from modulora_conformance.products import Products
from modulora_conformance.tiles import Tiles
from modulora_core.spec import Quantizer


class QuantizerConformance(
    Identity, Packing, Golden, Tiles, Lookups, Products, Gradients, Memory, Persistence, Devices
):
    """Every check, L0 to L7. Subclass it in a test file, give the fixture ``quantizer``, and let pytest collect it::

        class TestMine(QuantizerConformance):
            @pytest.fixture(params=[{"bits": 2}, {"bits": 4}], ids=str)
            def quantizer(self, request):
                return registry.create("mine", request.param)

    A check that can't hold is overridden with a strict xfail that says why; one that is overridden or deleted otherwise fails
    ``test_no_check_is_overridden_or_deleted``.

    Attributes:
        golden: a folder of golden vectors (:mod:`modulora_conformance.golden`), or None.
    """

    golden: ClassVar[Path | None] = None

    @pytest.fixture
    def quantizer(self) -> Quantizer:
        pytest.fail(
            f"{type(self).__name__}: expected a fixture `quantizer` that returns a modulora_core Quantizer, got none",
            pytrace=False,
        )

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        cls.test_no_check_is_overridden_or_deleted = guard  # type: ignore[attr-defined]  # also over a subclass's own
