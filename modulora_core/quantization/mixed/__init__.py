"""Mixed precision: gives each layer the quantizer that keeps the loss smallest within a budget.

    mixture.py       the choice for one model: layers, sizes, errors, the layout
    errors.py        each layer's error under each quantizer, measured block by block
    allocation.py    the knapsack problem
    recorded.py      the choice of each layer, from a checkpoint's record

A :class:`Budget` takes the place of a quantizer's name in ``modulora_core.quantize``.
"""

from __future__ import annotations

from modulora_core.quantization.mixed.allocation import Allocation, Offer, allocate
from modulora_core.quantization.mixed.mixture import Budget
from modulora_core.quantization.mixed.recorded import recorded_allocation

__all__ = ["Allocation", "Budget", "Offer", "allocate", "recorded_allocation"]
