"""An entry point that imports torch."""

from __future__ import annotations

import torch as torch  # the fault
from modulora_zoo import SPECS

from modulora_core.hookspecs import hookimpl


@hookimpl
def modulora_quantizers():
    return [SPECS["HeavyMetadata"]]
