"""Mixed precision under a budget: every layer its own quantizer, so that all of it fits and the loss grows least.

::

    candidates.py    what may be chosen: quantizers, layers, bytes; what is refused before work
    errors.py        each layer's error under each quantizer, measured block by block
    allocation.py    the choice: a knapsack
    run.py           the command's work: measure, choose, quantize
    recorded.py      what went where, from a checkpoint's record

docs/mixed-precision.md says what is measured, and why.
"""

from __future__ import annotations

from modulora_core.quantization.mixed.allocation import Allocation, Offer, allocate
from modulora_core.quantization.mixed.recorded import recorded_allocation
from modulora_core.quantization.mixed.run import quantize_mixed
from modulora_core.registry import Choice

__all__ = ["Allocation", "Choice", "Offer", "allocate", "quantize_mixed", "recorded_allocation"]
