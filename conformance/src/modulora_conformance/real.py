"""Weights as large as real layers. Each is packed, read and multiplied once for all checks.

A weight is *steep*: each row and each block of columns has a size and a mean of its own. A piece
that is swapped, dropped or stale then differs from the right one.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from modulora_conformance.cases import (
    SPREAD,
    fit,
    generator,
    inputs,
    pack,
    tile,
)
from modulora_conformance.changes import same_bits
from modulora_conformance.levels.packing import promise_of
from modulora_conformance.memo import once
from modulora_core.dense_products import one_thread
from modulora_core.spec import PackedWeight, Quantizer

BIG = (513, 33_024)
"""17 million weights, more than 2²⁴, and 258 groups of 128 in a row."""

BIG_WITH_H = (2049, 2304)
"""The same for a quantizer that requires H, which is a square."""

SIDES = (
    (1024, 1024),
    (1023, 65),
    (1025, 33),
    (33, 1025),
    (65, 1023),
    (256, 1280),
    (1280, 256),
    (896, 129),
    (31, 4095),
    (4097, 15),
)
"""Multiples of 64, 128, 256 and 1024, and numbers beside them."""

MANY = (385, 640)
"""A weight that is multiplied by each number of :data:`ROWS`."""

ROWS = (1, 2, 15, 16, 17, 31, 32, 63, 64, 65, 127, 128, 512, 2048, 4097)
"""Rows of x: one token, blocks of kernels and one beside them, long texts."""

IN_16_BITS = (1, 16, 33, 65, 512, 4097)
"""The numbers of rows that bf16 and fp16 x has too."""

FAST, SLOW_FROM = 0.5, 20.0
"""Processor seconds for packing :data:`BIG`. From the first on, only the spec's first promise has
it; from the second on, none has: :data:`SLOW` is the one large weight."""

SLOW = (513, 1152)

BLOCK = 64
"""The columns of a piece whose error is measured."""

STEEP_BLOCK = 128
"""The columns with one size and mean."""

AS_USUAL = 3.0
"""The most of the largest error in a small weight. A real layer has a hundred times the pieces."""


NEARLY_LOST = 0.95
"""The most error of a coarse quantizer's piece. A lost piece has 1, a swapped one more."""


@dataclass
class Outcome:
    """The results that the checks of one weight compare.

    Attributes:
        shape: of the weight.
        seconds: that packing took.
        faults: messages by the name of a check.
        errors: of products, by name: the error, the dtype of x, and the case.
        pieces: the largest error of a row, of a column and of a piece.
    """

    shape: tuple[int, int]
    seconds: float = 0.0
    faults: dict[str, list[str]] = field(default_factory=dict)
    errors: list[tuple[float, torch.dtype, str]] = field(default_factory=list)
    pieces: dict[str, float] = field(default_factory=dict)

    def note(self, check: str, message: str) -> None:
        self.faults.setdefault(check, []).append(message)


LAYOUT, RANGES, INPUT, CALLERS = "layout", "ranges", "input", "callers"
"""Keys of :attr:`Outcome.faults`."""


def steep(shape: tuple[int, int], seed: int) -> Tensor:
    """Normal values; each row has another size and mean in each :data:`STEEP_BLOCK` columns."""
    (rows, columns), draw = shape, generator(seed)
    blocks = -(-columns // STEEP_BLOCK)
    size = torch.randint(-1, 3, (rows, blocks), generator=draw).float().exp2()
    mean = torch.randint(-1, 2, (rows, blocks), generator=draw).float()
    W = torch.randn(rows, blocks, STEEP_BLOCK, generator=draw)
    return (W.add_(mean[..., None]).mul_(SPREAD * size[..., None])).flatten(1)[:, :columns]


def piece_errors(
    found: Tensor, exact: Tensor, shape: tuple[int, int] | None = None
) -> dict[str, float]:
    """The largest error of a row, a column and a piece of a row, relative to its norm.

    A norm counts as the root mean square of all norms at least: rotations spread errors. NaN is
    infinite.

    Args:
        shape: cuts longer rows and columns to the length that a weight of this shape has.
    """
    difference, whole = (found - exact).square_(), exact.square()
    height, width = (min(n, m) for n, m in zip(shape or whole.shape, whole.shape, strict=True))

    def largest(dim: int, size: int) -> float:
        sums, norms = (
            t.narrow(dim, 0, t.shape[dim] // size * size).unflatten(dim, (-1, size)).sum(dim + 1)
            for t in (difference, whole)
        )
        share = sums / torch.maximum(norms, norms.mean()).clamp(min=1e-30)
        return float(share.nan_to_num(nan=torch.inf).max().sqrt())

    pieces = {"a piece of a row": largest(1, BLOCK)} if width >= BLOCK else {}
    return {"a row": largest(1, width), "a column": largest(0, height), **pieces}


def limit_of_pieces(quantizer: Quantizer, shape: tuple[int, int]) -> dict[str, float]:
    """The most error of each kind of piece of a weight: :data:`AS_USUAL` times a small weight's.

    Pieces of the small weight are as short: the errors of few weights vary. The limit is below 1,
    the error of a lost piece, for all but the coarsest quantizers.
    """
    usual = _usual_pieces(quantizer, shape)
    return {
        name: min(AS_USUAL * e, max((1 + e) / 2, min(1.3 * e, NEARLY_LOST), 1.1 * e)) + 1e-6
        for name, e in usual.items()
    }


@once(most=64)
def _usual_pieces(quantizer: Quantizer, shape: tuple[int, int]) -> dict[str, float]:
    return piece_errors(*_small(quantizer), shape)


@once(most=4)
def _small(quantizer: Quantizer) -> tuple[Tensor, Tensor]:
    """A small steep weight after packing, and before."""
    W = steep(fit(quantizer, 256, 512), 3)
    return tile(quantizer, pack(quantizer, W)), W


def multiplies_itself(quantizer: Quantizer) -> bool:
    """Whether it has a ``matmul`` of its own. The inherited one is tested with the core."""
    return type(quantizer).matmul is not Quantizer.matmul


@once(most=64)
def seconds_for_big(quantizer: Quantizer) -> float:
    """The estimated processor seconds for packing :data:`BIG`. Cached."""
    W = steep(fit(quantizer, 128, 1024), 4)
    pack(quantizer, W)  # whatever is made or compiled once exists now
    with one_thread():  # threads that wait for each other count as work
        start = time.process_time()
        pack(quantizer, W)
    return (time.process_time() - start) / W.numel() * BIG[0] * BIG[1]


def is_slow(quantizer: Quantizer) -> bool:
    return seconds_for_big(quantizer) > SLOW_FROM


def big(quantizer: Quantizer) -> Outcome:
    """The outcome of the largest weight that the quantizer packs in seconds. Cached."""
    first = promise_of(quantizer) in quantizer.spec.promises[:1] or not quantizer.spec.promises
    required = quantizer.spec.calibration == "required"
    shape = BIG_WITH_H if required else BIG
    if seconds_for_big(quantizer) > (SLOW_FROM if first else FAST):
        shape = SLOW
    rows = (1, 17, 65) if multiplies_itself(quantizer) else (33,)
    return _outcome(quantizer, shape, rows)


def sides(quantizer: Quantizer) -> Iterator[Outcome]:
    """The outcomes of :data:`SIDES`; none if packing is slow. Each is cached."""
    rows = (1, 3, 16, 65) if multiplies_itself(quantizer) else (1, 16)
    required = quantizer.spec.calibration == "required"
    for shape in () if is_slow(quantizer) else SIDES:
        if required and shape[1] > 2048:
            continue
        yield _outcome(quantizer, shape, rows)


def many(quantizer: Quantizer) -> Outcome:
    """The outcome of every number of :data:`ROWS`. Cached."""
    shape = (129, 320) if is_slow(quantizer) else MANY
    return _outcome(quantizer, shape, ROWS)


@once(most=64)
def _outcome(quantizer: Quantizer, shape: tuple[int, int], rows: tuple[int, ...]) -> Outcome:
    shape = fit(quantizer, *shape)
    W = steep(shape, 5)
    start = time.perf_counter()
    packed = pack(quantizer, W)
    found = Outcome(shape, time.perf_counter() - start)
    if packed.layout != (expected := quantizer.layout(shape)):
        found.note(LAYOUT, f"{list(shape)}: expected the layout {expected}, got {packed.layout}")
    whole = tile(quantizer, packed)
    found.pieces = piece_errors(whole, W)
    del W
    _compare_ranges(quantizer, packed, whole, found)
    _compare_products(quantizer, packed, tile(quantizer, packed, torch.float64), rows, found)
    return found


def _compare_ranges(
    quantizer: Quantizer, packed: PackedWeight, whole: Tensor, found: Outcome
) -> None:
    n = packed.shape[0]
    for start, stop in ((0, 1), (n // 3, n // 3 + 65), (n - 33, n), (n - 1, n), (1, n)):
        start, stop = max(0, start), min(n, stop)
        if not same_bits(tile(quantizer, packed, torch.float32, start, stop), whole[start:stop]):
            case = f"rows {start} to {stop} of a {list(packed.shape)} weight"
            found.note(RANGES, f"{case}: expected the bits of the whole, got others")


def _compare_products(
    quantizer: Quantizer, packed: PackedWeight, W: Tensor, rows: tuple[int, ...], found: Outcome
) -> None:
    for transpose in (False, True):
        M = W.T if transpose else W  # [features of y, features of x]
        norms = M.norm(dim=1)
        norms = torch.maximum(norms, M.norm() / max(1, len(M)) ** 0.5).clamp(min=1e-300)
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            x_all = _inputs(max(rows), M, dtype)
            exact = x_all.double() @ M.T  # once for all rows
            scale = x_all.double().norm(dim=1, keepdim=True)  # as in product_error
            for n in rows if dtype == torch.float32 else [n for n in rows if n in IN_16_BITS]:
                x = x_all[:n].clone()
                case = f"{list(packed.shape)}, {n} rows, {transpose=}"
                y = quantizer.matmul(x, packed, transpose)
                if not torch.equal(x, x_all[:n]):
                    found.note(INPUT, f"{case}: expected x unchanged, got it changed")
                error = (y.double() - exact[:n]).abs_().div_(scale[:n]).div_(norms)
                found.errors.append((float(error.nan_to_num(nan=torch.inf).max()), dtype, case))
                if rows == ROWS:
                    before = y.clone()
                    quantizer.matmul(x.neg_(), packed, transpose)
                    if not torch.equal(y, before):
                        found.note(CALLERS, f"{case}: a later product overwrote this one")


def _inputs(rows: int, M: Tensor, dtype: torch.dtype) -> Tensor:
    """Random x: ``[rows, features]``. In 16 bits, each row of x resembles a row of M.

    A sum of thousands of random products is below the limit in bf16, and so is a wrong one. Such a
    row makes one large.
    """
    x = inputs((rows,), M.shape[1], torch.float32, 6)
    if dtype == torch.float32:
        return x
    like = M[torch.linspace(0, len(M) - 1, rows).long()]
    return (x + like / like.square().mean(1, keepdim=True).sqrt()).to(dtype)
