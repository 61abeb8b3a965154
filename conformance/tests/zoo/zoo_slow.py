"""An entry point that computes something when it is imported."""

from __future__ import annotations

import time

from modulora_zoo import SPECS

from modulora_core.hookspecs import hookimpl
from modulora_core.spec import QuantizerSpec

end = time.process_time() + 0.6
while time.process_time() < end:
    pass


@hookimpl
def modulora_quantizers() -> list[QuantizerSpec]:
    return [SPECS["SlowMetadata"]]
