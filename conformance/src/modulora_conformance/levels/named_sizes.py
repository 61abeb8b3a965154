"""L3: the sizes that the plugin's own source names, and sizes drawn anew."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch
from torch import Tensor

from modulora_conformance.cases import (
    DTYPES,
    both_ways,
    correlated,
    fit,
    gaussian,
    identity,
    pack,
    tile,
)
from modulora_conformance.changes import check_same_bytes, same_bits, same_packed
from modulora_conformance.checks import Level, needs
from modulora_conformance.covered.numbers import numbers_of
from modulora_conformance.levels.accuracy import END, MARGIN, PROMISED, usual_error
from modulora_conformance.levels.lookups import LOOKUP
from modulora_conformance.levels.packing import promise_of
from modulora_conformance.levels.products import FORWARD, TRANSPOSED
from modulora_conformance.levels.tiles import RANGES
from modulora_conformance.oracle import dense, product_error, relative_error
from modulora_conformance.results import Measurements
from modulora_conformance.tolerances import PRODUCT
from modulora_core.errors import WeightError
from modulora_core.spec import Calibration, PackedWeight, Quantizer

LARGEST = 2**17
"""Numbers from here on take too much memory."""

CALLS = 2100
"""The most calls in a row: a number above is not tried."""

WITH_H = 2400
"""The same for ``in``, where H is required."""

SECONDS, SHORT = 20.0, 0.7
"""For each kind of size with the first promise, and with the others. Six kinds take two minutes."""

SMALL = (24, 64)
DRAWN = 12

NAMED = "test_sizes_that_the_plugin_names_change_nothing"


class NamedSizes(Level):
    """A size is no secret: at each number in the plugin's source, and beside it, results hold."""

    level, title = "L3", "products"

    @pytest.mark.instrument
    @pytest.mark.parametrize("named_size", ["rows of x", "in", "out", "ids", "calls", "samples"])
    @needs(FORWARD, TRANSPOSED, LOOKUP, RANGES, PROMISED)
    def test_sizes_that_the_plugin_names_change_nothing(self, quantizer, measurements, named_size):
        """If this fails: at a number that your source names, or one beside it, a result is wrong.

        The source compares a size with it, or cuts there. Numbers are read from comparisons,
        slices, bounds, `//`, `%`, constants and options.
        """
        numbers = numbers_of(quantizer)
        required = quantizer.spec.calibration == "required"
        limits = {"calls": CALLS, "in": WITH_H if required else LARGEST}
        most = limits.get(named_size, LARGEST)
        found = sorted({n + d for n in numbers for d in (-1, 0, 1) if n < most})
        left = [n for n in numbers if n >= most]
        first = promise_of(quantizer) in quantizer.spec.promises[:1]
        end = None  # what the first one compiles takes no time of the others
        for n, check in _CHECKS[named_size](quantizer, found, measurements):
            if end is not None and time.monotonic() > end:
                left += [each for each in numbers if n - 1 <= each < most]
                break
            check()
            end = end or time.monotonic() + (SECONDS if first else SHORT)
        if left:
            measurements.note(f"{named_size}: not tried at {', '.join(map(str, sorted({*left})))}")

    @pytest.mark.instrument
    @pytest.mark.threads
    @needs(FORWARD, TRANSPOSED, LOOKUP, RANGES, NAMED)
    def test_sizes_drawn_anew_change_nothing(self, quantizer, measurements, request):
        """If this fails: at some size, dtype, stride or number of threads a result is wrong.

        That is a product, a row, a NaN that is lost, or a NaN in a weight that is not refused.

        The sizes are drawn from the run's seed, which `--seed` repeats.
        """
        draw = random.Random(f"{request.config.getoption('hypothesis_seed', 0)}")
        threads = torch.get_num_threads()
        try:
            for _ in range(DRAWN):
                sides = (_log(draw, 300), _log(draw, 2000))
                shape, rows = fit(quantizer, *sides[:: draw.choice((1, -1))]), _log(draw, 300)
                dtype, count = draw.choice(DTYPES), draw.choice((1, 2, 3, 8, 16))
                torch.set_num_threads(count)
                with_h = quantizer.spec.calibration != "none" and draw.random() < 0.5
                case = f"{list(shape)}, {rows} rows, {dtype}, {count} threads, {with_h=}"
                weight = _packed_anew(quantizer, shape, draw, with_h, case)
                _check_rows(quantizer, weight, (draw.randrange(shape[0]),), case)
                W = dense(quantizer, weight)
                for transpose, x in both_ways(weight, rows, dtype=dtype):
                    wide = torch.full((rows, x.shape[1] + draw.randrange(9)), torch.nan).to(dtype)
                    view = wide[:, : x.shape[1]]
                    view.copy_(x)
                    _check_product(quantizer, weight, W, view, transpose, case, measurements)
                    view[draw.randrange(rows), draw.randrange(x.shape[1])] = torch.nan
                    lost = quantizer.matmul(view, weight, transpose)[view.isnan().any(1)].isfinite()
                    assert not bool(lost.any()), f"{case}: expected NaN of an x with NaN"
        finally:
            torch.set_num_threads(threads)


def _packed_anew(
    quantizer: Quantizer, shape: tuple[int, int], draw: random.Random, with_h: bool, case: str
) -> PackedWeight:
    """A drawn weight, packed by two threads at once. It is refused with NaN at a drawn place."""
    weight = gaussian(shape, draw.randrange(2**16))
    H = correlated(shape[1], draw.randrange(2**16)) if with_h else None

    def packed(_: int = 0) -> PackedWeight:
        return pack(quantizer, weight) if H is None else quantizer.pack(weight, H)

    with ThreadPoolExecutor(2) as pool:
        found, other = pool.map(packed, range(2))
    check_same_bytes(found, other, f"{case}: packed by two threads at once")
    if with_h and quantizer.wants_calibration and min(shape[0], shape[1] // 4) >= 16:
        unlike = quantizer.pack(weight, identity(shape[1]))
        assert not same_packed(found, unlike), f"{case}: expected other bytes with another H"
    weight[draw.randrange(shape[0]), draw.randrange(shape[1])] = torch.nan
    with pytest.raises(WeightError):
        packed()
    return found


def _log(draw: random.Random, most: int) -> int:
    """A number from 1 to ``most``: each order of magnitude as often."""
    return int(most ** draw.random())


def _check_product(
    quantizer: Quantizer,
    weight: PackedWeight,
    W: Tensor,
    x: Tensor,
    transpose: bool,
    case: str,
    measurements: Measurements,
) -> None:
    before = x.clone()
    y = quantizer.matmul(x, weight, transpose)
    assert torch.equal(x, before), f"{case}: expected x unchanged, got it changed"
    error = product_error(y, before, W, transpose)
    name, limit = f"product in {x.dtype}", PRODUCT[x.dtype].value
    measurements.at_most(name, error, limit, case=f"{case}, {transpose=}")


def _check_rows(
    quantizer: Quantizer, weight: PackedWeight, starts: Iterable[int], case: str
) -> None:
    """Two rows from each start on, as a tile and by ids."""
    whole = tile(quantizer, weight)
    for start in starts:
        stop = min(start + 2, len(whole))
        part = tile(quantizer, weight, torch.float32, start, stop)
        assert same_bits(part, whole[start:stop]), f"{case}: rows from {start} on: other bits"
        found = quantizer.lookup(torch.arange(start, stop), weight, torch.float32)
        assert same_bits(found, whole[start:stop]), f"{case}: ids from {start} on: other bits"


Checks = Iterator[tuple[int, Callable[[], None]]]
"""Numbers of the source, each with the check of a size that equals it."""


def _rows_of_x(quantizer: Quantizer, numbers: list[int], measurements: Measurements) -> Checks:
    weight = pack(quantizer, gaussian(fit(quantizer, *SMALL), 0))
    W = dense(quantizer, weight)

    def check(n: int) -> None:
        for dtype in (torch.float32, torch.bfloat16):
            for transpose, x in both_ways(weight, n, dtype=dtype, seed=n):
                _check_product(quantizer, weight, W, x, transpose, f"{n} rows", measurements)

    yield from ((n, partial(check, n)) for n in numbers)


def _sides(dim: int) -> Callable[[Quantizer, list[int], Measurements], Checks]:
    def checks(quantizer: Quantizer, numbers: list[int], measurements: Measurements) -> Checks:
        usual = usual_error(quantizer)

        def check(shape: tuple[int, int]) -> None:
            dense_weight, case = gaussian(shape, 1), str(list(shape))
            weight = pack(quantizer, dense_weight)
            W = dense(quantizer, weight)
            error = relative_error(W, dense_weight)
            measurements.at_most("error", error, END * usual + MARGIN, case=case)
            last = shape[0] - 1
            _check_rows(quantizer, weight, {0, max(0, last - 1), last}, case)
            for rows in (1, 3, 40):
                for transpose, x in both_ways(weight, rows):
                    _check_product(quantizer, weight, W, x, transpose, case, measurements)

        other = 3
        shapes = {n: fit(quantizer, *((n, other) if dim == 0 else (other, n))) for n in numbers}
        for n in {shape: n for n, shape in shapes.items()}.values():
            yield n, partial(check, shapes[n])

    return checks


def _ids(quantizer: Quantizer, numbers: list[int], measurements: Measurements) -> Checks:  # noqa: ARG001
    weight = pack(quantizer, gaussian(fit(quantizer, *SMALL), 2))
    whole = tile(quantizer, weight)

    def check(n: int) -> None:
        ids = torch.arange(n) * 7 % len(whole)
        found = quantizer.lookup(ids, weight, torch.float32)
        assert same_bits(found, whole[ids]), f"{n} ids: expected the rows of the tile"

    yield from ((n, partial(check, n)) for n in numbers)


def _calls(quantizer: Quantizer, numbers: list[int], measurements: Measurements) -> Checks:  # noqa: ARG001
    own = type(quantizer)(quantizer.options)
    weight = pack(own, gaussian(fit(own, *SMALL), 3))
    results = [
        partial(tile, own, weight),
        partial(own.lookup, torch.tensor([1]), weight, torch.float32),
        *(partial(own.matmul, x, weight, transpose) for transpose, x in both_ways(weight, 3)),
    ]
    expected, done = [result() for result in results], 1

    def check(n: int) -> None:
        nonlocal done
        for call in range(done, n):
            done = call + 1
            for result, first in zip(results, expected, strict=True):
                assert same_bits(result(), first), f"call {done}: expected the first one's bits"

    yield from ((n, partial(check, n + 1)) for n in numbers)


def _samples(quantizer: Quantizer, numbers: list[int], measurements: Measurements) -> Checks:
    if quantizer.spec.calibration == "none":
        return
    weight = gaussian(fit(quantizer, *SMALL), 4)
    H = identity(weight.shape[1]).hessian
    usual = max(
        usual_error(quantizer), relative_error(tile(quantizer, pack(quantizer, weight)), weight)
    )

    def check(n: int) -> None:
        found = tile(quantizer, quantizer.pack(weight, Calibration(H, n)))
        limit, error = END * usual + MARGIN, relative_error(found, weight)
        measurements.at_most("error with H", error, limit, case=f"{n} samples")

    yield from ((n, partial(check, n)) for n in numbers)


_CHECKS: dict[str, Callable[[Quantizer, list[int], Measurements], Checks]] = {
    "rows of x": _rows_of_x,
    "in": _sides(1),
    "out": _sides(0),
    "ids": _ids,
    "calls": _calls,
    "samples": _samples,
}
