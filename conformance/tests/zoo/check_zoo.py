"""One subclass of the kit for each quantizer of the zoo: pytest runs this in a process of its own, from ``tests/test_zoo.py``."""

from __future__ import annotations

import importlib
import os
from typing import Any

import modulora_zoo
import pytest
from modulora_conformance import QuantizerConformance

ASKED = os.environ.get("MODULORA_ZOO", "")
"""Names of classes, by commas; empty means all."""


def check(cls: str) -> type:
    module, name = modulora_zoo.SPECS[cls].location.split(":")

    def quantizer(self: Any) -> Any:
        return getattr(importlib.import_module(module), name)()

    members = {"quantizer": pytest.fixture(quantizer), "__module__": __name__}
    return type(f"Test{cls}", (QuantizerConformance,), members)


for name in modulora_zoo.SPECS:
    if not ASKED or name in ASKED.split(","):
        globals()[f"Test{name}"] = check(name)
