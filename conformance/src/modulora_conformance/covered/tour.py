"""Uses a quantizer in all ways at small sizes, where every line of its source can be seen.

A compiled kernel shows no lines. So the tour goes through three other processes: without numba, in
Python instead of numba (``NUMBA_DISABLE_JIT``), and in Triton's interpreter. They import the copy
of the package in which each part of a condition has its line.
"""

from __future__ import annotations

import importlib
import itertools
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from modulora_conformance.cases import (
    DTYPES,
    both_ways,
    choices,
    correlated,
    fit,
    gaussian,
    identity,
    inputs,
    neighbours,
    pack,
    second_moment,
    tile,
)
from modulora_conformance.covered.recording import coverage_of, recording
from modulora_core.dense_products import one_thread
from modulora_core.errors import ModuLoRAError
from modulora_core.registry import create
from modulora_core.spec import Calibration, PackedWeight, Quantizer

WITHOUT, NUMBA, TRITON = "without numba", "numba's functions in Python", "Triton's interpreter"
"""The tours. ``TRITON_INTERPRET`` must be in the environment of the last one."""

SHAPES = ((5, 131), (16, 64), (1, 1), (20, 256), (3, 1030), (70, 33))
"""Before they fit."""

FEW = 2
"""All options meet the first shapes."""

SHAPES_OF = {WITHOUT: len(SHAPES), NUMBA: FEW, TRITON: 1}
"""The shapes of a tour: an interpreter is slow."""

TILED = (((16, 127), (1, 33)), ((5, 61), (33, 1)))
"""``(out, in)`` of several groups and of one, and rows of x in both directions."""

SECONDS = 60.0
"""A tour ends after so many, whatever is left."""

TOO_LONG = f"it ended after {SECONDS:.0f} s, before the last use"

FAULTS = 3
"""The most messages of a tour that reports show."""


def tour(
    name: str,
    options: Sequence[Mapping[str, Any]],
    copies: str,
    where: str,
    larger: Sequence[tuple[int, int, int]] = (),
) -> tuple[bytes, list[str]]:
    """Use a quantizer, and record its copied source. A job for ``elsewhere``.

    Args:
        options: the sets to use it with.
        copies: the folder of the copied packages.
        where: :data:`WITHOUT`, :data:`NUMBA` or :data:`TRITON`.
        larger: further ``(rows of x, out, in)``.

    Returns:
        what coverage.py recorded, and the first errors.
    """
    sys.path.insert(0, copies)
    importlib.invalidate_caches()
    if where == WITHOUT:
        sys.modules["numba"] = None  # type: ignore[assignment]
    elif where == NUMBA:
        import numba

        numba.config.DISABLE_JIT = 1  # as NUMBA_DISABLE_JIT, which is read once
    warnings.simplefilter("ignore")
    recorder = coverage_of([f"{copies}/*"])
    faults, end = dict[str, None](), time.monotonic() + SECONDS
    with one_thread(), recording(recorder):
        for use in _uses(name, options, where, larger):
            try:
                use()
            except (ModuLoRAError, IndexError):  # a refusal
                pass
            except Exception as error:
                faults.setdefault(f"{type(error).__name__}: {error}".partition("\n")[0])
            if time.monotonic() > end:
                return recorder.get_data().dumps(), [TOO_LONG, *faults][:FAULTS]
    return recorder.get_data().dumps(), [*faults][:FAULTS]


def _uses(
    name: str,
    sets: Sequence[Mapping[str, Any]],
    where: str,
    larger: Sequence[tuple[int, int, int]],
) -> Iterator[Callable[[], Any]]:
    """All uses; what makes a weight for the next ones runs when it is asked for."""
    quantizers = [create(name, options) for options in sets]
    first = quantizers[0]
    others = [type(first)(first.Options.model_validate(each)) for each in neighbours(first, 1)]
    if where == TRITON:  # all uses take minutes, and these reach the kernels of each format
        for quantizer, (sides, counts) in itertools.product([*quantizers, *others], TILED):
            packed = pack(quantizer, gaussian(fit(quantizer, *sides), 0))
            yield partial(tile, quantizer, packed, torch.bfloat16, 3)
            for transpose, count in zip((False, True), counts, strict=True):
                x = inputs((count,), packed.shape[0 if transpose else 1], torch.bfloat16)
                if quantizer in quantizers:
                    yield partial(quantizer.matmul, x, packed, transpose)
    few = where != WITHOUT
    rows = (1, 3, 33) if few else (1, 2, 3, 17, 33, 70)
    for number, shape in enumerate(SHAPES[: SHAPES_OF[where]]):
        for quantizer in [*quantizers, *others] if number < FEW and where != TRITON else [first]:
            weight, whole = gaussian(fit(quantizer, *shape), 0), quantizer is first
            for calibration in _calibrations(quantizer, weight) if number < FEW and whole else ():
                yield partial(quantizer.pack, weight, calibration)
            for other in _weights(weight) if number < FEW and whole else ():
                yield partial(pack, quantizer, other)
            try:
                packed = pack(quantizer, weight)
            except Exception:
                continue
            yield from _reads(quantizer, packed, rows)
            for name in packed.tensors if not few else ():
                yield partial(tile, quantizer, _crafted(packed, name))
            if (number, quantizer) == (0, first):
                yield from _forms(quantizer, packed)
    for options in _options(first, VALUES if where != TRITON else VALUES[4:5]):
        yield partial(_brief, type(first), options)
    for count, out_features, in_features in larger:
        shape = fit(first, out_features, in_features)
        yield from _products(first, pack(first, gaussian(shape, 0)), (count,))


VALUES = (-1, 0, 1, 3, 24, 96, 2**40)
"""Of each option: refused, or used once."""


def _options(quantizer: Quantizer, values: Sequence[int]) -> Iterator[dict[str, Any]]:
    """The quantizer's options with each choice of one, or with each of the values."""
    own, fields = quantizer.options.model_dump(), type(quantizer).Options.model_fields
    for name, field in fields.items():
        yield from (own | {name: each} for each in choices(field.annotation) or values)


def _brief(cls: type[Quantizer], options: dict[str, Any]) -> None:
    """Read a weight that is packed with other options, unless they are refused."""
    try:
        quantizer = cls(cls.Options.model_validate(options))
    except ValidationError:
        return
    weight = gaussian(fit(quantizer, 3, 130), 0)
    packed = pack(quantizer, weight)
    tile(quantizer, packed)
    for transpose, x in both_ways(packed, 3):
        quantizer.matmul(x, packed, transpose)
    with torch.inference_mode():
        tile(quantizer, pack(quantizer, weight))
    for name in packed.tensors:
        with suppress(ModuLoRAError):
            quantizer.check_values(_crafted(packed, name), "a weight")


def _calibrations(quantizer: Quantizer, weight: torch.Tensor) -> Iterator[Calibration | None]:
    out_features, in_features = weight.shape
    yield None
    if quantizer.spec.calibration == "none":
        return
    yield identity(in_features)
    H = correlated(in_features, 1)
    yield H
    yield Calibration(H.hessian, 9, output_hessian=correlated(out_features).hessian)
    for case in ("singular", "dead inputs", "zero", "no samples", "misfit"):
        yield second_moment(case, in_features)
    yield Calibration(H.hessian, 9, progress=lambda share: None)  # noqa: ARG005


def _weights(weight: torch.Tensor) -> Iterator[torch.Tensor]:
    for dtype in DTYPES:
        yield weight.to(dtype)
    yield weight.T.contiguous().T
    yield torch.zeros_like(weight)
    for factor in (1e-30, 1e30, float("nan"), float("inf")):
        yield weight * factor
    yield weight.abs()
    yield weight[:0]
    yield weight[:, :1].expand_as(weight)


def _products(
    quantizer: Quantizer, packed: PackedWeight, rows: Sequence[int]
) -> Iterator[Callable[[], Any]]:
    for dtype, counts in zip(DTYPES, ((3,), rows, (3,), (3,)), strict=True):
        for count in counts:
            for transpose, x in both_ways(packed, count, dtype=dtype):
                yield partial(quantizer.matmul, x, packed, transpose)


def _forms(q: Quantizer, p: PackedWeight) -> Iterator[Callable[[], Any]]:
    """Multiply x of any dimensions and strides."""
    for leading in ((), (0,), (2, 3)):
        for transpose, x in both_ways(p, *leading):
            yield partial(q.matmul, x, p, transpose)
            yield partial(q.matmul, x[..., :-1], p, transpose)
    for transpose, x in both_ways(p, 6):
        yield partial(q.matmul, x[::2], p, transpose)
        yield partial(q.matmul, x.T.contiguous().T, p, transpose)


def _reads(
    quantizer: Quantizer, packed: PackedWeight, rows: Sequence[int]
) -> Iterator[Callable[[], Any]]:
    q, p, (n, m) = quantizer, packed, packed.shape
    yield partial(q.layout, (n, m))
    for start, stop in ((n // 3, n), (n - 1, n), (n, n), (0, n + 1)):
        yield partial(tile, q, p, torch.float32, start, stop)
    for ids in ([n - 1, 0, n // 2], [], [n], [-1]):
        yield partial(q.lookup, torch.tensor(ids, dtype=torch.int64), p, torch.bfloat16)
    for dtype in DTYPES:
        yield partial(tile, q, p, dtype)
    yield from _products(q, p, rows)
    for dim, size in enumerate((n, m)):
        for start, stop in itertools.pairwise((0, size // 4, size // 2, size)):
            yield partial(q.sliced, p, dim, start, stop)
        yield partial(q.sliced, p, dim, size // 3, size - size // 3)
    if q.snaps:
        V = gaussian((n, m), 1)
        yield partial(q.snap, p, (n // 3, n), (0, m // 2), V[n // 3 :, : m // 2])
        yield partial(q.snapped, p, V)
    yield partial(q.rescaled, p, torch.full((m,), 1.1), torch.full((n,), 0.9))
    yield partial(q.check_format, p)
    yield partial(q.check_values, p, "a weight")
    yield partial(q.check_kernels, p, torch.bfloat16)
    for name in p.tensors:
        yield partial(q.check_values, _crafted(p, name), "a weight")
    yield partial(
        q.check_format, PackedWeight(p.quantizer, p.format, (n + 1, m + 1), p.tensors, p.metadata)
    )
    for name in p.metadata:
        yield partial(_relabelled, q, p, name)


def _crafted(packed: PackedWeight, name: str) -> PackedWeight:
    """A weight with all bits of one tensor set."""
    tensor = packed.tensors[name].clone()
    tensor.view(torch.uint8).fill_(255)
    return packed.layout.fill({**packed.tensors, name: tensor})


def _relabelled(quantizer: Quantizer, packed: PackedWeight, name: str) -> None:
    """Check a weight with other metadata, as in an edited file."""
    metadata = {**packed.metadata, name: "nothing"}
    weight = PackedWeight(packed.quantizer, packed.format, packed.shape, packed.tensors, metadata)
    quantizer.check_format(weight)


def write_copies(modules: Mapping[str, Sequence[Any]], folder: Path) -> None:
    """Copy packages, with a line for each part of a condition, and with all that lies in them.

    Args:
        modules: by the name of a package, its modules.
    """
    import shutil

    for package, found in modules.items():
        first = found[0].path
        target = folder / package
        if first.name == "__init__.py":
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree(first.parent, target, ignore=ignored)
        for module in found:
            copy = copy_of(module.path, first, folder, package)
            copy.write_text(module.copy, encoding="utf-8")


def copy_of(path: Path, first: Path, folder: Path, package: str) -> Path:
    """The copy of a package's file; ``first`` is the package's ``__init__.py``, or its one file."""
    if first.name != "__init__.py":
        return folder / path.name
    return folder / package / path.relative_to(first.parent)
