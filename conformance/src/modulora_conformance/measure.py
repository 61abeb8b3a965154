"""Measures a quantizer, and writes the promises that its spec can make.

It packs the same weights as the checks, so a pasted promise is kept.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence

from modulora_conformance.cases import KINDS, fit, pack
from modulora_conformance.footprints import packing_peaks
from modulora_conformance.levels.packing import ERROR_SHAPE, SIZE_SHAPE
from modulora_conformance.oracle import dense, relative_error
from modulora_conformance.pytest_plugin import configurations
from modulora_core.registry import create
from modulora_core.spec import Promise, Quantizer

ROOM = 1.01
"""A promised error is at least so many times the measured one: other processors round otherwise."""

LEAST = 1e-6
"""The smallest error to promise, from rounding in fp32."""


def measured(name: str, options: Sequence[str] = ()) -> list[Promise]:
    """The promise for the options (``key=value``), or for each set that the spec promises now.

    Raises:
        PluginError, OptionError: as :func:`modulora_core.registry.create`.
    """
    found = configurations(name, list(options))
    return [promise(create(name, each.options), list(each.options)) for each in found]


def promise(quantizer: Quantizer, given: Sequence[str]) -> Promise:
    """The measured size and errors, rounded up a little; ``given`` names options to promise."""
    errors = {}
    for kind, weights in KINDS.items():
        weight = weights(fit(quantizer, *ERROR_SHAPE), 7)
        error = relative_error(dense(quantizer, pack(quantizer, weight)), weight)
        errors[kind] = max(LEAST, rounded_up(ROOM * error, digits=2))
    bits = quantizer.layout(fit(quantizer, *SIZE_SHAPE)).bits_per_weight
    size = rounded_up(bits, digits=4)
    options = {name: quantizer.options.model_dump(mode="json")[name] for name in given}
    return Promise(options=options, bits_per_weight=size, **errors)


def packing_memory(name: str, options: Sequence[str] = ()) -> float:
    """The number for ``spec.packing_memory``: the largest of all these configurations."""
    shares = []
    for each in configurations(name, list(options)):
        peaks, unit = packing_peaks(create(name, each.options))
        shares.append(max(peaks.values()) / unit)
    return max(0.1, rounded_up(ROOM * max(shares), digits=2))


def rounded_up(value: float, digits: int) -> float:
    """The next number from ``value`` on with so many significant digits."""
    if value == 0:
        return 0.0
    places = digits - 1 - math.floor(math.log10(value))
    # 4.5 stays 4.5, whatever the last bit of its product
    unit = 10.0**places
    return round(math.ceil(round(value * unit, 6)) / unit, places)


def as_code(promises: Sequence[Promise], memory: float) -> str:
    """The arguments ``packing_memory`` and ``promises`` of a QuantizerSpec, to paste."""
    lines = [f"    packing_memory={memory},", "    promises=("]
    for each in promises:
        lines.append("        Promise(")
        pairs = (f"{json.dumps(key)}: {_literal(value)}" for key, value in each.options.items())
        lines.append(f"            options={{{', '.join(pairs)}}},")
        numbers = each.model_dump(exclude={"options"})
        lines += [f"            {name}={value!r}," for name, value in numbers.items()]
        lines.append("        ),")
    return "\n".join([*lines, "    ),"])


def _literal(value: object) -> str:
    return json.dumps(value) if isinstance(value, str) else repr(value)
