"""Other options of the same quantizer: what another layer of a model may have, and what must make no difference to this one."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import ValidationError

from modulora_core.spec import Quantizer

KEPT = 2
"""So many options at most are left as they are."""


def other_options(quantizer: Quantizer) -> list[dict[str, Any]]:
    """Options that its model takes, with another number or flag wherever there is one, but for none, one or two of them; and those
    that its spec promises something for.

    A table that is kept by some options and made from others too is thus asked for with the same keys and another content, and before
    one of the same content: hence those with the most differences come first.
    """
    model, own = type(quantizer).Options, quantizer.options.model_dump()
    changed = {name: value for name in own if (value := _another(quantizer, name)) is not None}
    tried = [
        own | {name: changed[name] for name in changed if name not in kept}
        for kept in _subsets(changed)
    ]
    found: list[dict[str, Any]] = []
    for options in (*tried, *(promise.options for promise in quantizer.spec.promises)):
        try:
            valid = model.model_validate(dict(options))
        except ValidationError:  # two of them exclude each other
            continue
        recorded = valid.model_dump(mode="json")
        if valid != quantizer.options and recorded not in found:
            found.append(recorded)
    return found


def _another(quantizer: Quantizer, name: str) -> Any:
    """Another value of an option that is valid beside the others as they are; None where none is found."""
    own = quantizer.options.model_dump()
    value = own[name]
    tried: tuple[Any, ...] = ()
    if isinstance(value, bool):
        tried = (not value,)
    elif isinstance(value, (int, float)):
        tried = (value + 1, value - 1, 2 * value, value / 2)
    for other in tried:
        try:
            type(quantizer).Options.model_validate(own | {name: type(value)(other)})
        except ValidationError:
            continue
        return type(value)(other)
    return None


def _subsets(changed: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
    for size in range(KEPT + 1):
        yield from itertools.combinations(changed, size)
