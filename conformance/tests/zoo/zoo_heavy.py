"""An entry point that imports torch."""

import torch as torch  # the fault
from modulora_zoo import SPECS

from modulora_core.hookspecs import hookimpl


@hookimpl
def modulora_quantizers():
    return [SPECS["HeavyMetadata"]]
