"""An entry point that computes when the kit's check of metadata imports it."""

import sys
import time

from modulora_zoo import SPECS

from modulora_core.hookspecs import hookimpl

while "torch" not in sys.modules and time.process_time() < 1.5:
    pass


@hookimpl
def modulora_quantizers():
    return [SPECS["SlowMetadata"]]
