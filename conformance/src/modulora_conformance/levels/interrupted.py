"""L3: Ctrl-C and a lack of memory end a call at once, and spoil nothing."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from modulora_conformance.cases import both_ways, correlated, fit, gaussian, pack, tile
from modulora_conformance.changes import same_bits, same_packed
from modulora_conformance.checks import Level, needs
from modulora_conformance.levels.lookups import LOOKUP
from modulora_conformance.levels.products import FORWARD, TRANSPOSED
from modulora_conformance.levels.state import NEW
from modulora_core.spec import PackedWeight, Quantizer

PLACES = 6
"""Of so many of torch's operations in a call, each is the last one once."""


class _Ends(TorchDispatchMode):
    """Counts torch's operations, and raises ``error`` instead of number ``at``."""

    def __init__(self, error: type[BaseException] | None = None, at: int = -1) -> None:
        super().__init__()
        self.error, self.at, self.count = error, at, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        if self.count == self.at and self.error is not None:
            raise self.error("the kit ends this call")
        return func(*args, **(kwargs or {}))


class Interrupted(Level):
    """A call that ends early says so, and the next one gives what it should."""

    level, title = "L3", "products"

    @pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError], ids=lambda e: e.__name__)
    @needs(FORWARD, TRANSPOSED, LOOKUP, NEW)
    def test_an_interrupted_call_ends_and_spoils_nothing(self, quantizer, error):
        """If this fails: Ctrl-C or a lack of memory within a call is caught, or spoils a later one.

        A bare `except` takes both for an ordinary fault. What a call changes first, and sets back
        at its end, stays changed: use `with` or `finally`.
        """
        for name, call in _calls(quantizer).items():
            with _Ends() as counted:
                expected = call()
            step = max(1, counted.count // PLACES)
            for at in range(1, counted.count + 1, step):
                case = f"{name}, at operation {at} of {counted.count}"
                try:
                    with _Ends(error, at) as ended:
                        call()
                except error:
                    pass
                else:
                    if ended.count < at:  # a table was made in the call before
                        continue
                    pytest.fail(f"{case}: expected {error.__name__}, got a result")
                assert _same(call(), expected), f"the call after {case}: expected the same bits"


def _calls(quantizer: Quantizer) -> dict[str, Callable[[], Tensor | PackedWeight]]:
    weight = gaussian(fit(quantizer, 28, 104), 110)
    packed = pack(quantizer, weight)
    calls: dict[str, Callable[[], Tensor | PackedWeight]] = {
        "pack": partial(pack, quantizer, weight),
        "dequantize_tile": partial(tile, quantizer, packed),
        "lookup": partial(quantizer.lookup, torch.tensor([2, 0]), packed, torch.bfloat16),
    }
    if quantizer.spec.calibration != "none":
        calls["pack with H"] = partial(quantizer.pack, weight, correlated(weight.shape[1]))
    for rows in (1, 40):
        for transpose, x in both_ways(packed, rows, dtype=torch.bfloat16):
            name = f"matmul of {rows} rows, {transpose=}"
            calls[name] = partial(quantizer.matmul, x, packed, transpose)
    return calls


def _same(a: Tensor | PackedWeight, b: Tensor | PackedWeight) -> bool:
    if isinstance(a, PackedWeight) and isinstance(b, PackedWeight):
        return same_packed(a, b)
    return isinstance(a, Tensor) and isinstance(b, Tensor) and same_bits(a, b)
