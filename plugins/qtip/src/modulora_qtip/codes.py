"""Code functions: the value of a state of L bits, computed by a few operations (section 3.1).

    1mad    x = (34038481 s + 76625530) mod 2³²; the value is the sum of x's four bytes − 510
    3inst   x = (89226354 s + 64248484) mod 2³²; x = (x AND 0x8FFF8FFF) XOR 0x3B603B60;
            the value is the sum of both halves of x, each read as fp16, rounded to fp16
    mcg     x = 0xCBAC1FED s mod 2³², then as 3inst                                      EXL3's
    mul1    x = 0x83DCD12D s mod 2³²; the value is (1024 + the sum of x's four bytes) a + b,
            rounded once to fp16, a and b the fp16 numbers 0x1EEE and 0xC931              EXL3's
    bytes   x as in mul1; the value is the sum of x's four bytes − 510

The paper divides 1mad by 147.8. Here a weight's scale holds that factor, so that the values of 1mad
and bytes are whole numbers, exact in fp16. Of all, bytes is the fastest to decode, and with fewer
than 16 bits a state it loses least.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Literal

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Code:
    """A code function.

    Attributes:
        multiplier, addend: x = (multiplier · s + addend) mod 2³².
        kind: how x becomes a value: ``"bytes"`` as 1mad, ``"halves"`` as 3inst, ``"fused"`` as
            mul1.
        deviation: the standard deviation of the values.
    """

    multiplier: int
    addend: int
    kind: Literal["bytes", "halves", "fused"]
    deviation: float


CODES = {
    "1mad": Code(34038481, 76625530, "bytes", 147.8),
    "3inst": Code(89226354, 64248484, "halves", 1.24),
    "mcg": Code(0xCBAC1FED, 0, "halves", 1.24),
    "mul1": Code(0x83DCD12D, 0, "fused", 1.0),
    "bytes": Code(0x83DCD12D, 0, "bytes", 147.8),
}

MASK, FLIP = 0x8FFF8FFF, 0x3B603B60
"""For the halves of 3inst and mcg."""

FACTOR, OFFSET = (
    float(torch.tensor(bits - 2**16 * (bits >> 15), dtype=torch.int16).view(torch.float16))
    for bits in (0x1EEE, 0xC931)
)
"""a and b of mul1."""


def values(states: Tensor, code: str) -> Tensor:
    """The values of ``states``, whole numbers from 0 to 2¹⁶ − 1 of any shape: fp32."""
    function = CODES[code]
    x = (states.to(torch.int64) * function.multiplier + function.addend) & 0xFFFFFFFF
    if function.kind == "halves":
        x = (x & MASK) ^ FLIP
        low, high = _half(x), _half(x >> 16)
        return (low + high).to(torch.float16).to(torch.float32)
    total = (x & 255) + (x >> 8 & 255) + (x >> 16 & 255) + (x >> 24)
    if function.kind == "bytes":
        return (total - 510).to(torch.float32)
    # a sum of fp16 products is exact in fp32, so fp16 rounds once
    return ((1024 + total).to(torch.float32) * FACTOR + OFFSET).to(torch.float16).to(torch.float32)


def _half(x: Tensor) -> Tensor:
    """The low 16 bits as an fp16 number, in fp32."""
    low = x & 0xFFFF
    return (low - (low >> 15 << 16)).to(torch.int16).view(torch.float16).to(torch.float32)


@cache
def table(code: str, states: int, device: torch.device) -> Tensor:
    """The value of each state of so many bits: fp32 ``[2^states]``, shared: do not write to it."""
    return values(torch.arange(1 << states, device=device), code)
