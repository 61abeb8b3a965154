"""Joins all levels in one class."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import pytest

from modulora_conformance.checks import GUARD, guard
from modulora_conformance.golden import Golden
from modulora_conformance.levels.accuracy import Accuracy
from modulora_conformance.levels.calibrated import Calibrated
from modulora_conformance.levels.devices import Devices
from modulora_conformance.levels.forms import Forms
from modulora_conformance.levels.gradients import Gradients
from modulora_conformance.levels.identity import Identity
from modulora_conformance.levels.interrupted import Interrupted
from modulora_conformance.levels.lookups import Lookups
from modulora_conformance.levels.memory import Memory
from modulora_conformance.levels.modes import Modes
from modulora_conformance.levels.named_sizes import NamedSizes
from modulora_conformance.levels.packing import Packing
from modulora_conformance.levels.persistence import Persistence
from modulora_conformance.levels.processes import Processes
from modulora_conformance.levels.products import Products
from modulora_conformance.levels.real_products import RealProducts
from modulora_conformance.levels.real_weights import RealWeights
from modulora_conformance.levels.serving import Serving
from modulora_conformance.levels.snapped import Snapped
from modulora_conformance.levels.state import State
from modulora_conformance.levels.tiles import Tiles
from modulora_conformance.levels.watched import Watched
from modulora_core.spec import Quantizer


class QuantizerConformance(
    Identity,
    Packing,
    Accuracy,
    Calibrated,
    Golden,
    Tiles,
    State,
    Lookups,
    Snapped,
    RealWeights,
    Products,
    Forms,
    Modes,
    RealProducts,
    NamedSizes,
    Interrupted,
    Gradients,
    Memory,
    Persistence,
    Processes,
    Devices,
    Serving,
    Watched,
):
    """Runs every check, L0 to L9. Subclass it in a test file with the fixture ``quantizer``::

        class TestMine(QuantizerConformance):
            @pytest.fixture(params=[{"bits": 2}, {"bits": 4}], ids=str)
            def quantizer(self, request):
                return registry.create("mine", request.param)

    Override a check that cannot pass with a strict xfail and its reason. Any other override or
    deletion fails ``test_no_check_is_overridden_or_deleted``.

    Attributes:
        golden: a folder of golden vectors (:mod:`modulora_conformance.golden`), or None.
    """

    golden: ClassVar[Path | None] = None

    @pytest.fixture
    def quantizer(self) -> Quantizer:
        pytest.fail(
            f"{type(self).__name__}: expected a fixture `quantizer` that returns a modulora_core "
            "Quantizer, got none",
            pytrace=False,
        )

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        setattr(cls, GUARD, guard)  # replaces a subclass's own
