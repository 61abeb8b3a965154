"""Compute a result once for each quantizer and its options."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, wraps
from typing import Any, TypeVar, TypeVarTuple

from modulora_core.spec import Quantizer

Ts = TypeVarTuple("Ts")
R = TypeVar("R")


def once(most: int) -> Callable[[Callable[[Quantizer, *Ts], R]], Callable[[Quantizer, *Ts], R]]:
    """Cache a function of a quantizer and hashable arguments; ``most`` results are kept.

    The function gets a new quantizer of the same class and options: nothing else of the caller's
    instance can matter.
    """

    def decorate(compute: Callable[[Quantizer, *Ts], R]) -> Callable[[Quantizer, *Ts], R]:
        @lru_cache(maxsize=most)
        def computed(cls: type[Quantizer], options: str, arguments: tuple[Any, ...]) -> R:
            return compute(cls(cls.Options.model_validate_json(options)), *arguments)

        @wraps(compute)
        def cached(quantizer: Quantizer, *arguments: *Ts) -> R:
            return computed(type(quantizer), quantizer.options.model_dump_json(), arguments)

        return cached

    return decorate
