"""An entry point that imports torch."""

from __future__ import annotations

from modulora_zoo import SPECS
from modulora_zoo.kernels import HeavyPackage as HeavyPackage  # the fault: it imports torch

from modulora_core.hookspecs import hookimpl


@hookimpl
def modulora_quantizers():
    return [SPECS["HeavyMetadata"]]
