"""What ``modulora bench`` measures: one layer of a quantizer on this machine, beside the dense one.

=============  =====================================================  ===================================================
kind           the quantizer's                                        beside it
=============  =====================================================  ===================================================
``pack``       a float32 weight is packed                             it is copied
``decode``     Ŵ is dequantized, tile by tile                         a dense weight of that dtype is copied, by those tiles
``forward``    x Ŵᵀ                                                   x Wᵀ
``transposed`` y Ŵ                                                    y W
``lora_step``  forward and backward of a LoRA layer                   those of a dense LoRA layer
=============  =====================================================  ===================================================

Both sides take turns (:mod:`modulora_conformance.bench.timing`), and operands rotate, so that they come from memory. The dense side of
products has the dtype in which tiles are multiplied (:func:`modulora_core.tiles.compute_dtype`): the input's, or float32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from modulora_conformance.bench.timing import (
    Call,
    Timing,
    cold_copies,
    device_name,
    in_turns,
    rotating,
)
from modulora_core.autograd import lora_linear
from modulora_core.errors import ModuLoRAError, OptionError, ShapeError, WorkError
from modulora_core.spec import Calibration, PackedWeight, Quantizer
from modulora_core.tiles import compute_dtype, tile_bytes, tile_ranges

Progress = Callable[[int, int, str], None]
"""``progress(done, total, what)``: measurements."""

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

ROWS = (1, 16, 512)
"""A token being generated; a batch of them; a batch being trained on."""

RANK, SCALE = 8, 2.0

SPREAD = 0.02
"""The standard deviation of the weight: that of a language model's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchConfig:
    """What is measured.

    Attributes:
        shape: ``(out, in)`` of the weight; rows: of the inputs, of which the largest number is for the LoRA step too.
        dtypes: of the inputs and tiles, names of :data:`DTYPES`.
        device: where; seconds: for each comparison, both sides together.

    Raises:
        OptionError: a size or the seconds aren't positive, or an unknown dtype.
    """

    shape: tuple[int, int] = (2048, 2048)
    rows: tuple[int, ...] = ROWS
    dtypes: tuple[str, ...] = ("float32", "bfloat16")
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    seconds: float = 1.0

    def __post_init__(self) -> None:
        if min(self.shape) < 1:
            raise OptionError(
                f"shape: expected positive sizes OUTxIN, got {self.shape[0]}x{self.shape[1]}"
            )
        if not self.rows or min(self.rows) < 1:
            raise OptionError(f"rows: expected positive numbers of rows, got {list(self.rows)}")
        if not self.seconds > 0:
            raise OptionError(f"seconds: expected more than 0, got {self.seconds:g}")
        unknown = [name for name in self.dtypes if name not in DTYPES]
        if unknown or not self.dtypes:
            raise OptionError(f"dtype: expected some of {', '.join(DTYPES)}, got {', '.join(unknown) or 'none'}")  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """One row: the quantizer's way and the dense one in the same turns.

    Attributes:
        kind: as in the table above; dtype: of the input or the tiles; rows: of the input, None for ``pack`` and ``decode``.
        ours: the quantizer's times; dense: the other's.
        moved: bytes that the quantizer's way reads and writes, packed and dense; dense_moved: the other's. 0 for products.
    """

    kind: str
    dtype: str
    rows: int | None
    ours: Timing
    dense: Timing
    moved: int = 0
    dense_moved: int = 0

    @property
    def ratio(self) -> float:
        """The quantizer's time as a multiple of the dense way's: below 1 it is faster."""
        return self.ours.beside(self.dense)

    @property
    def bandwidth(self) -> float | None:
        """Bytes a second that the quantizer's way moves; None for products."""
        return self.moved / self.ours.seconds if self.moved else None

    @property
    def share(self) -> float | None:
        """:attr:`bandwidth` as a share of what the copy reaches: 1 is the memory's speed."""
        return self.moved / self.dense_moved / self.ratio if self.moved else None

    def to_json(self) -> dict[str, Any]:
        told: dict[str, Any] = {
            "kind": self.kind,
            "dtype": self.dtype,
            "rows": self.rows,
            "ratio": self.ratio,
        }
        told |= {"ours": self.ours.to_json(), "dense": self.dense.to_json()}
        if self.moved:
            told |= {"bytes_per_second": self.bandwidth, "share_of_copy": self.share}
        return told


@dataclass(frozen=True, slots=True)
class Bench:
    """What was found of one quantizer with its options.

    Attributes:
        bits_per_weight: of the packed weight, everything counted; comparisons: in the order of the table above.
    """

    quantizer: Quantizer
    config: BenchConfig
    bits_per_weight: float
    comparisons: tuple[Comparison, ...]

    @property
    def noise(self) -> float:
        """The worst of all timings: how many times its best a median is."""
        return max(timing.noise for row in self.comparisons for timing in (row.ours, row.dense))

    def to_json(self) -> dict[str, Any]:
        """The object of ``modulora bench --json``. Seconds, and bytes a second; a ratio is ours / dense."""
        return {
            "quantizer": self.quantizer.spec.name,
            "options": self.quantizer.options.model_dump(mode="json"),
            "shape": list(self.config.shape),
            "device": str(self.config.device),
            "device_name": device_name(self.config.device),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "rank": RANK,
            "bits_per_weight": self.bits_per_weight,
            "noise": self.noise,
            "comparisons": [row.to_json() for row in self.comparisons],
        }


def measure_quantizer(
    quantizer: Quantizer,
    config: BenchConfig | None = None,
    progress: Progress | None = None,
    *,
    packed: PackedWeight | None = None,
) -> Bench:
    """Measure one quantizer. Calibrated ones get an identity H: every input counts the same.

    Args:
        packed: a weight of the config's shape on its device, to be used instead of packing one; ``pack`` is then left out.

    Raises:
        ShapeError: the quantizer can't take the shape, or ``packed`` has another; said before any work.
        WorkError: the quantizer failed; says at what.
    """
    config = config or BenchConfig()
    quantizer.check_shape(config.shape)
    if packed is not None and packed.shape != config.shape:
        raise ShapeError(
            f"bench: expected a packed weight of shape {config.shape}, got {packed.shape}"
        )
    return _Measurement(quantizer, config, progress).run(packed)


class _Measurement:
    """One run: the weights, and what to do with them."""

    def __init__(
        self, quantizer: Quantizer, config: BenchConfig, progress: Progress | None
    ) -> None:
        self.quantizer, self.config, self.progress = quantizer, config, progress
        self.device = config.device
        self.generator = torch.Generator().manual_seed(0)
        self.done, self.total = 0, 1 + len(config.dtypes) * (2 + 2 * len(config.rows))

    def run(self, packed: PackedWeight | None) -> Bench:
        rows: list[Comparison] = []
        if packed is None:
            packed, packing = self._pack()
            rows.append(packing)
        weights = self._copies(packed, packed.nbytes, lambda: _copy(packed))
        for name in self.config.dtypes:
            dtype = DTYPES[name]
            rows.append(self._decode(weights, name))
            dense = self._dense(compute_dtype(dtype, self.device))
            for n in self.config.rows:
                rows += [
                    self._product(weights, dense, name, n, transpose) for transpose in (False, True)
                ]
            rows.append(self._lora_step(weights, dense, name))
        return Bench(self.quantizer, self.config, packed.layout.bits_per_weight, tuple(rows))

    def _pack(self) -> tuple[PackedWeight, Comparison]:
        """Packing, once where that takes longer than the seconds: some quantizers take minutes."""
        weights = self._dense(torch.float32)
        last: list[PackedWeight] = []

        def pack(weight: Tensor) -> None:
            last[:] = [self._packed(weight)]

        with self._telling("pack"):
            self._warm_up_packing()
            calls = {"ours": rotating(pack, weights), "dense": rotating(Tensor.clone, weights)}
            seconds = self.config.seconds
            timings = in_turns(calls, seconds=seconds, least=1, device=self.device, warm_up=0)
        [packed], nbytes = last, weights[0].nbytes
        return packed, Comparison(kind="pack", dtype="float32", rows=None, ours=timings["ours"], dense=timings["dense"],
                                  moved=nbytes + packed.nbytes, dense_moved=2 * nbytes)  # fmt: skip

    def _decode(self, weights: list[PackedWeight], dtype: str) -> Comparison:
        dense = self._dense(DTYPES[dtype])
        out_features, in_features = self.config.shape
        ranges = list(tile_ranges(out_features, in_features * dense[0].element_size(), tile_bytes(self.device)))  # fmt: skip

        def decode(packed: PackedWeight) -> None:
            for rows in ranges:
                self.quantizer.dequantize_tile(packed, rows, DTYPES[dtype])

        def copy(weight: Tensor) -> None:
            for start, stop in ranges:
                weight[start:stop].clone()

        nbytes = dense[0].nbytes
        return self._compare("decode", dtype, None, rotating(decode, weights), rotating(copy, dense),
                             moved=weights[0].nbytes + nbytes, dense_moved=2 * nbytes)  # fmt: skip

    def _product(
        self,
        weights: list[PackedWeight],
        dense: list[Tensor],
        dtype: str,
        rows: int,
        transpose: bool,
    ) -> Comparison:
        x = self._normal(rows, self.config.shape[0 if transpose else 1])
        operand, x = x.to(dense[0].dtype), x.to(DTYPES[dtype])

        def ours(packed: PackedWeight) -> None:
            self.quantizer.matmul(x, packed, transpose)

        def plain(weight: Tensor) -> None:
            torch.mm(operand, weight if transpose else weight.t())

        kind = "transposed" if transpose else "forward"
        return self._compare(kind, dtype, rows, rotating(ours, weights), rotating(plain, dense))

    def _lora_step(
        self, weights: list[PackedWeight], dense: list[Tensor], dtype: str
    ) -> Comparison:
        """Y and the gradients dX, dA, dB, for the largest number of rows."""
        rows, (out_features, in_features) = max(self.config.rows), self.config.shape
        A, B = (t.requires_grad_() for t in (self._normal(RANK, in_features), self._normal(out_features, RANK)))  # fmt: skip

        def step(x: Tensor, dY: Tensor, layer: Callable[[Tensor], Tensor]) -> None:
            with torch.enable_grad():
                torch.autograd.grad(layer(x), (x, A, B), dY)

        def ours(packed: PackedWeight) -> None:
            step(x, dY, lambda x: lora_linear(x, self.quantizer, packed, A=A, B=B, scale=SCALE))

        def plain(weight: Tensor) -> None:
            step(operand, gradient, lambda x: _dense_lora(x, weight, A, B))

        x, dY = self._normal(rows, in_features), self._normal(rows, out_features)
        operand, gradient = x.to(dense[0].dtype, copy=True).requires_grad_(), dY.to(dense[0].dtype)
        x, dY = x.to(DTYPES[dtype]).requires_grad_(), dY.to(DTYPES[dtype])
        return self._compare(
            "lora_step", dtype, rows, rotating(ours, weights), rotating(plain, dense)
        )

    def _compare(
        self, kind: str, dtype: str, rows: int | None, ours: Call, dense: Call, *, moved: int = 0, dense_moved: int = 0
    ) -> Comparison:  # fmt: skip
        size = "" if rows is None else f", {rows} row{'s' * (rows > 1)}"
        with self._telling(f"{kind} in {dtype}{size}"), torch.no_grad():
            calls = {"ours": ours, "dense": dense}
            timings = in_turns(calls, seconds=self.config.seconds, device=self.device)
        return Comparison(kind=kind, dtype=dtype, rows=rows, ours=timings["ours"], dense=timings["dense"],
                          moved=moved, dense_moved=dense_moved)  # fmt: skip

    def _packed(self, weight: Tensor) -> PackedWeight:
        calibration = None
        if self.quantizer.spec.calibration != "none":
            calibration = Calibration(
                torch.eye(weight.shape[1], device=self.device), weight.shape[1]
            )
        with torch.no_grad():
            return self.quantizer.pack(weight, calibration)

    def _warm_up_packing(self) -> None:
        """Pack a small weight, so that compiling isn't timed: the smallest part of the shape that the quantizer takes."""
        out_features, in_features = self.config.shape
        for parts in (16, 8, 4, 2):
            small = (out_features // parts, in_features // parts)
            if min(small) > 0 and _takes(self.quantizer, small):
                self._packed(SPREAD * self._normal(*small))
                return

    def _dense(self, dtype: torch.dtype) -> list[Tensor]:
        weight = (SPREAD * self._normal(*self.config.shape)).to(dtype)
        return self._copies(weight, weight.nbytes, weight.clone)

    def _copies(self, first: Any, nbytes: int, copy: Callable[[], Any]) -> list[Any]:
        """As many as keep caches cold; one on CUDA, where the clock overwrites them."""
        count = 1 if self.device.type == "cuda" else cold_copies(nbytes)
        return [first, *(copy() for _ in range(count - 1))]

    def _normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator).to(self.device)

    @contextmanager
    def _telling(self, what: str) -> Iterator[None]:
        """Tell the progress, and a failure in a sentence that says at what."""
        if self.progress is not None:
            self.progress(self.done, self.total, what)
        try:
            yield
        except ModuLoRAError:
            raise
        except Exception as error:  # a plugin may raise anything
            name = self.quantizer.spec.name
            told = " ".join(f"{type(error).__name__}: {error}".split())
            raise WorkError(f"bench of {name}: {what}: expected it to work, got {told}; `modulora conformance {name}` finds what is "
                            "broken") from error  # fmt: skip
        self.done += 1
        if self.progress is not None:
            self.progress(self.done, self.total, what)


def _copy(packed: PackedWeight) -> PackedWeight:
    return packed.layout.fill({name: tensor.clone() for name, tensor in packed.tensors.items()})


def _takes(quantizer: Quantizer, shape: tuple[int, int]) -> bool:
    try:
        quantizer.check_shape(shape)
    except ShapeError:
        return False
    return True


def _dense_lora(x: Tensor, W: Tensor, A: Tensor, B: Tensor) -> Tensor:
    """Y = X Wᵀ + s (X Aᵀ) Bᵀ as PEFT computes it: the adapter in its own dtype."""
    y = F.linear(x, W)
    return y + (SCALE * F.linear(F.linear(x.to(A.dtype), A), B)).to(y.dtype)
