"""An entry point that imports torch."""

from __future__ import annotations

import torch  # noqa: F401  # the bug
from modulora_zoo import SPECS

from modulora_core.hookspecs import hookimpl
from modulora_core.spec import QuantizerSpec


@hookimpl
def modulora_quantizers() -> list[QuantizerSpec]:
    return [SPECS["HeavyMetadata"]]
