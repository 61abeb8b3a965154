"""Mixed precision: gives each layer the quantizer that keeps the loss smallest within a budget.

candidates.py    the quantizers and layers to choose from, and their sizes
errors.py        each layer's error under each quantizer, measured block by block
allocation.py    the choice: a knapsack problem
run.py           the whole run: measure, choose, quantize
recorded.py      the choice of each layer, from a checkpoint's record
"""

from __future__ import annotations

from modulora_core.quantization.mixed.allocation import Allocation, Offer, allocate
from modulora_core.quantization.mixed.recorded import recorded_allocation
from modulora_core.quantization.mixed.run import quantize_mixed
from modulora_core.registry import Choice

__all__ = ["Allocation", "Choice", "Offer", "allocate", "quantize_mixed", "recorded_allocation"]
