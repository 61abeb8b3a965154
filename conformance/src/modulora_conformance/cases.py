"""Makes everything that the checks pack and multiply, from seeds: weights, calibrations, inputs."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from enum import Enum
from typing import Any, Literal, get_args, get_origin

import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from pydantic.fields import FieldInfo
from torch import Tensor

from modulora_conformance.memo import once
from modulora_core.errors import ShapeError
from modulora_core.spec import Calibration, PackedWeight, Quantizer

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)

SETTINGS = settings(
    max_examples=30,
    deadline=None,  # a kernel is compiled in the first example
    database=None,  # the printed seed repeats a failure
    print_blob=True,
    # the quantizer of the fixture holds no state, and many classes share a check
    suppress_health_check=[
        HealthCheck.function_scoped_fixture,
        HealthCheck.differing_executors,
        HealthCheck.too_slow,
    ],
)
"""The settings of every check that Hypothesis draws examples for."""

SPREAD = 0.02
"""The standard deviation of a weight, as in language models."""

FAR = 64
"""A bound of an option is tried if it is at most so many times the option's value."""

UNSET = {int: 64, float: 1.0}
"""An optional number without a value is tried near these."""

seeds = st.integers(0, 2**16)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def gaussian(shape: tuple[int, int], seed: int) -> Tensor:
    return SPREAD * torch.randn(shape, generator=generator(seed))


def heavy_tailed(shape: tuple[int, int], seed: int) -> Tensor:
    """Student's t with 3 degrees of freedom."""
    chi = torch.randn(3, *shape, generator=generator(seed + 1)).square().mean(0)
    return gaussian(shape, seed) / chi.sqrt()


def outlier_columns(shape: tuple[int, int], seed: int) -> Tensor:
    """Every 64th column is 20 times as large."""
    weight = gaussian(shape, seed)
    weight[:, ::64] *= 20
    return weight


def constant(shape: tuple[int, int], seed: int) -> Tensor:
    return torch.full(shape, SPREAD * (1 + seed % 7) / 4)


KINDS: dict[str, Callable[[tuple[int, int], int], Tensor]] = {
    "gaussian": gaussian,
    "heavy_tailed": heavy_tailed,
    "outlier_columns": outlier_columns,
    "constant": constant,
}
"""The kinds of weights in a :class:`~modulora_core.spec.Promise`."""


def fit(quantizer: Quantizer, out_features: int, in_features: int) -> tuple[int, int]:
    """The smallest shape from this one on that the quantizer accepts."""
    spec = quantizer.spec
    rows, columns = spec.next_shape((max(1, out_features), max(1, in_features)))
    for step in range(32):
        taller, wider = rows + step * spec.out_multiple, columns + step * spec.in_multiple
        for shape in ((taller, columns), (rows, wider)):
            if accepts(quantizer, shape):
                return shape
    return rows, columns  # pack() reports the fault


def accepts(quantizer: Quantizer, shape: tuple[int, int]) -> bool:
    try:
        quantizer.check_shape(shape)
    except ShapeError:
        return False
    return True


@st.composite
def shapes(
    draw: st.DrawFn, quantizer: Quantizer, rows: int = 40, columns: int = 90
) -> tuple[int, int]:
    """Draws ``(out, in)`` up to about ``rows`` and ``columns``, odd if the quantizer accepts it."""
    return fit(quantizer, draw(st.integers(1, rows)), draw(st.integers(1, columns)))


@st.composite
def weights(draw: st.DrawFn, quantizer: Quantizer) -> Tensor:
    """Draws a weight of any kind of :data:`KINDS` and any shape."""
    shape, kind = draw(shapes(quantizer)), draw(st.sampled_from(sorted(KINDS)))
    return KINDS[kind](shape, draw(seeds))


def identity(in_features: int) -> Calibration:
    """H = 1: every input has the same weight."""
    return Calibration(torch.eye(in_features), 1)


def correlated(in_features: int, seed: int = 0) -> Calibration:
    """Correlated inputs of different magnitudes, as in a language model. H is fp32 ``[in, in]``."""
    mix = torch.randn(in_features, in_features, generator=generator(seed)) / math.sqrt(in_features)
    x = torch.randn(4 * in_features, in_features, generator=generator(seed + 1))
    x = x @ (mix + torch.eye(in_features)) * torch.logspace(-1, 1, in_features)
    H = x.T @ x / len(x)
    return Calibration((H + H.T) / 2, len(x))


def second_moment(case: str, n: int) -> Calibration:
    """An H as real data may give it, ``[n, n]``; ``"misfit"`` fits another shape."""
    H = correlated(n).hessian
    if case == "singular":
        x = torch.randn(3, n, generator=generator(0))
        return Calibration(x.T @ x / 3, 3)
    if case == "dead inputs":
        alive = (torch.arange(n) % 4 != 1).to(H.dtype)
        return Calibration(H * alive[:, None] * alive, 4 * n)
    if case == "zero":
        return Calibration(torch.zeros(n, n), 8)
    return Calibration(torch.eye(n), 0) if case == "no samples" else identity(n + 1)


def pack(quantizer: Quantizer, weight: Tensor) -> PackedWeight:
    """Pack without calibration data; H is the identity if the spec requires one."""
    required = quantizer.spec.calibration == "required"
    return quantizer.pack(weight, identity(weight.shape[1]) if required else None)


def packed(quantizer: Quantizer, shape: tuple[int, int], seed: int = 0) -> PackedWeight:
    """A packed Gaussian weight of the next shape that fits: a copy of a cached one."""
    return copy.deepcopy(_packed(quantizer, shape, seed))


@once(most=32)
def _packed(quantizer: Quantizer, shape: tuple[int, int], seed: int) -> PackedWeight:
    return pack(quantizer, gaussian(fit(quantizer, *shape), seed))


def tile(
    quantizer: Quantizer,
    packed: PackedWeight,
    dtype: torch.dtype = torch.float32,
    start: int = 0,
    stop: int | None = None,
) -> Tensor:
    """Rows ``[start, stop)`` of Ŵ; all rows by default."""
    rows = (start, packed.shape[0] if stop is None else stop)
    return quantizer.dequantize_tile(packed, rows, dtype)


def inputs(rows: tuple[int, ...], features: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """``[*rows, features]``, normal values."""
    return torch.randn(*rows, features, generator=generator(seed), dtype=torch.float64).to(dtype)


def both_ways(
    packed: PackedWeight, *rows: int, dtype: torch.dtype = torch.float32, seed: int = 0
) -> Iterator[tuple[bool, Tensor]]:
    """``(transpose, x)`` for each direction, with ``x: [*rows, features]``."""
    for transpose in (False, True):
        yield transpose, inputs(rows, packed.shape[0 if transpose else 1], dtype, seed)


def other_options(quantizer: Quantizer) -> list[dict[str, Any]]:
    """Other options of the same quantizer, as another layer of a model may have them.

    Every number, flag and choice is changed, except for none, one or two of them. Options of the
    promises follow. A cache with too small a key then meets one key with two contents.
    """
    own, changed = quantizer.options.model_dump(), _changed_options(quantizer)
    kept = [names for size in range(3) for names in itertools.combinations(changed, size)]
    tried = [
        own | {name: value for name, value in changed.items() if name not in names}
        for names in kept
    ]
    return _recorded(quantizer, (*tried, *(each.options for each in quantizer.spec.promises)))


def neighbours(quantizer: Quantizer, most: int = 3) -> list[dict[str, Any]]:
    """Sets of options that differ from the quantizer's own in one option.

    Args:
        most: values to try of each option; of three, the smallest, a middle and the largest one.
    """
    own, others = quantizer.options.model_dump(), _other_values(quantizer)
    tried = [own | {name: value} for name in others for value in _spread(others[name], most)]
    return _recorded(quantizer, tried)


def _spread(values: list[Any], most: int) -> list[Any]:
    """At most so many of the values: the middle one, or evenly from the first to the last."""
    if most == 1:
        return [values[len(values) // 2]]
    count = min(most, len(values))
    return [values[i * (len(values) - 1) // max(1, count - 1)] for i in range(count)]


def _recorded(quantizer: Quantizer, tried: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The valid sets of options, once each, without the quantizer's own."""
    found: list[dict[str, Any]] = []
    for options in tried:
        valid = _valid(quantizer, options)
        if valid not in (None, quantizer.options):
            recorded = valid.model_dump(mode="json")
            found += [] if recorded in found else [recorded]
    return found


def _changed_options(quantizer: Quantizer) -> dict[str, Any]:
    """Another valid value of each option that has one."""
    return {name: _spread(values, 1)[0] for name, values in _other_values(quantizer).items()}


def _other_values(quantizer: Quantizer) -> dict[str, list[Any]]:
    """The other valid values to try of each option that has one; numbers in ascending order."""
    own, found = quantizer.options.model_dump(), {}
    for name, value in own.items():
        valid = [
            other for other in _candidates(value, quantizer.Options.model_fields[name])
            if other != value and _valid(quantizer, own | {name: other}) is not None
        ]  # fmt: skip
        if valid:
            found[name] = valid
    return found


def _candidates(value: Any, field: FieldInfo) -> list[Any]:
    if isinstance(value, bool):
        return [not value]
    found = choices(field.annotation)
    near = value
    if value is None and not found:  # an optional number
        kinds = [kind for kind in UNSET if kind in get_args(field.annotation)]
        near = UNSET[kinds[0]] if kinds else None
    if isinstance(near, (int, float)) and not isinstance(near, Enum):
        found = sorted({*found, *_numbers(near, field.metadata)})
    return found


def _numbers(value: float, metadata: Sequence[Any]) -> Iterator[float]:
    """Numbers near an option's value, and the bounds of its field that are not :data:`FAR`.

    A far bound may be a number of rounds, which would take hours.
    """
    near = (value / 4, value / 2, value - 1, value + 1, 2 * value, 4 * value)
    bounds = (getattr(each, name, None) for each in metadata for name in ("ge", "le", "gt", "lt"))
    for each in (*near, *bounds):
        if each is not None and abs(each) <= FAR * max(1, abs(value)):
            yield type(value)(each)


def choices(annotation: Any) -> list[Any]:
    """The values of a Literal or of an Enum, also as a part of a union."""
    if get_origin(annotation) is Literal:
        return list(get_args(annotation))
    if isinstance(annotation, type) and issubclass(annotation, Enum):
        return list(annotation)
    return [choice for part in get_args(annotation) for choice in choices(part)]


def _valid(quantizer: Quantizer, options: Any) -> Any:
    """The options, or None if they are refused or pack no weight."""
    cls = type(quantizer)
    try:
        found = cls.Options.model_validate(dict(options))
    except ValidationError:
        return None
    other = cls(found)
    return found if accepts(other, fit(other, 32, 256)) else None
