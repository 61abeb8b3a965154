"""Measures one layer of a quantizer beside the dense one.

=============  ===============================  ==============================================
kind           the quantizer                    beside it
=============  ===============================  ==============================================
``pack``       packs a float32 weight           a copy of the weight
``decode``     decodes Ŵ tile by tile           a copy of a dense weight of that dtype, by tiles
``forward``    x Ŵᵀ                             x Wᵀ
``transposed`` y Ŵ                              y W
``lora_step``  forward, backward of a LoRA layer  the same of a dense LoRA layer
=============  ===============================  ==============================================

Both sides take turns (:mod:`modulora_conformance.bench.timing`), and operands rotate, so that they
come from memory. The dense side of products has the dtype in which tiles are multiplied
(:func:`modulora_core.dense_products.compute_dtype`): the input's, or float32."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from modulora_conformance.bench.comparisons import LABELS, RANK, Bench, Comparison
from modulora_conformance.bench.timing import Call, cold_copies, in_turns, rotating
from modulora_conformance.cases import SPREAD, accepts
from modulora_conformance.changes import clone
from modulora_core.autograd import FrozenWeight, lora_linear
from modulora_core.dense_products import compute_dtype
from modulora_core.errors import ModuLoRAError, OptionError, WorkError
from modulora_core.progress import Progress, no_progress
from modulora_core.spec import Calibration, PackedWeight, Quantizer
from modulora_core.tiles import tile_bytes, tile_ranges

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

SHAPE = (2048, 2048)

ROWS = (1, 16, 512)
"""A token being generated; a batch of them; a batch being trained on."""

SCALE = 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchConfig:
    """Chooses the measurements.

    Attributes:
        shape: ``(out, in)`` of the weight.
        rows: of the inputs; the LoRA step takes the largest.
        dtypes: of inputs and tiles, names of :data:`DTYPES`.
        device: of all tensors.
        seconds: for each comparison, both sides together.
    """

    shape: tuple[int, int] = SHAPE
    rows: tuple[int, ...] = ROWS
    dtypes: tuple[str, ...] = ("float32", "bfloat16")
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    seconds: float = 1.0


def config_for(
    quantizer: Quantizer,
    *,
    shape: str | None,
    rows: Sequence[int],
    dtypes: Sequence[str],
    device: torch.device,
    seconds: float,
) -> BenchConfig:
    """The config that the command line asks for. Empty ``rows`` and ``dtypes`` mean the defaults.

    Args:
        shape: ``"4096x11008"``; None takes the default, or the next shape that the quantizer
            accepts.

    Raises:
        OptionError: ``shape`` is malformed.
    """
    size = quantizer.spec.next_shape(SHAPE)
    if shape is not None:
        match = re.fullmatch(r"([1-9]\d*)[x×]([1-9]\d*)", shape.strip())
        if match is None:
            raise OptionError(f"--shape: expected OUTxIN, such as 4096x11008, got {shape!r:.60}")
        size = (int(match[1]), int(match[2]))
    given = {"shape": size, "rows": tuple(rows), "dtypes": tuple(dtypes)}
    chosen: dict[str, Any] = {name: value for name, value in given.items() if value}
    return BenchConfig(**chosen, device=device, seconds=seconds)


def measure_quantizer(
    quantizer: Quantizer,
    config: BenchConfig | None = None,
    progress: Progress = no_progress,
) -> Bench:
    """Measure one quantizer. A calibrated one gets H = 1.

    Raises:
        ShapeError: the quantizer refuses the shape; raised before any work.
        WorkError: the quantizer failed; the message names the measurement.
    """
    config = config or BenchConfig()
    quantizer.check_shape(config.shape)
    return _Measurement(quantizer, config, progress).run()


def measure_speed(quantizer: Quantizer) -> dict[str, Any]:
    """A short measurement for a report: one and 512 rows in float32. Empty if the quantizer fails.

    The weight has short rows: the packing time of calibrated quantizers grows with their square.
    """
    shape = quantizer.spec.next_shape((1024, 512))
    config = BenchConfig(shape=shape, rows=(1, 512), dtypes=("float32",), seconds=0.15)
    try:
        found = measure_quantizer(quantizer, config)
    except Exception:  # a check reports it
        return {}
    timings = [
        {
            "name": LABELS[row.kind] + (f", {row.rows} rows" if row.rows else ""),
            "seconds": row.ours.seconds,
            "dense_seconds": row.dense.seconds,
            "bytes": row.moved[0] if row.moved else 0,
            "noise": row.noise,
        }
        for row in found.comparisons
    ]
    return {"shape": shape, "threads": torch.get_num_threads(), "timings": timings}


class _Measurement:
    """Runs the comparisons of one quantizer."""

    def __init__(self, quantizer: Quantizer, config: BenchConfig, progress: Progress) -> None:
        self.quantizer, self.config, self.progress = quantizer, config, progress
        self.device = config.device
        self.generator = torch.Generator().manual_seed(0)
        self.done, self.total = 0, 1 + len(config.dtypes) * (2 + 2 * len(config.rows))

    def run(self) -> Bench:
        packed, packing = self._pack()
        rows = [packing]
        weights = self._copies(packed, packed.nbytes, lambda: clone(packed))
        for name in self.config.dtypes:
            rows.append(self._decode(weights, name))
            dense = self._dense(compute_dtype(DTYPES[name], self.device))
            for n in self.config.rows:
                rows += [self._product(weights, dense, name, n, t) for t in (False, True)]
            rows.append(self._lora_step(weights, dense, name))
        bits, shape = packed.layout.bits_per_weight, self.config.shape
        return Bench(self.quantizer, shape, self.device, bits, tuple(rows))

    def _pack(self) -> tuple[PackedWeight, Comparison]:
        """Pack, once if that takes longer than the seconds: some quantizers take minutes."""
        weights = self._dense(torch.float32)
        last: list[PackedWeight] = []

        def pack(weight: Tensor) -> None:
            last[:] = [self._packed(weight)]

        with self._reporting("pack"):
            self._warm_up_packing()
            calls = {"ours": rotating(pack, weights), "dense": rotating(Tensor.clone, weights)}
            seconds = self.config.seconds
            timings = in_turns(calls, seconds=seconds, least=1, device=self.device, warm_up=0)
        [packed], nbytes = last, weights[0].nbytes
        moved = (nbytes + packed.nbytes, 2 * nbytes)
        return packed, Comparison("pack", "float32", None, **timings, moved=moved)

    def _decode(self, weights: list[PackedWeight], dtype: str) -> Comparison:
        dense, (out_features, in_features) = self._dense(DTYPES[dtype]), self.config.shape
        row_bytes, limit = in_features * dense[0].element_size(), tile_bytes(self.device)
        ranges = list(tile_ranges(out_features, row_bytes, limit))

        def decode(packed: PackedWeight) -> None:
            for rows in ranges:
                self.quantizer.dequantize_tile(packed, rows, DTYPES[dtype])

        def copy(weight: Tensor) -> None:
            for start, stop in ranges:
                weight[start:stop].clone()

        nbytes = dense[0].nbytes
        moved = (weights[0].nbytes + nbytes, 2 * nbytes)
        calls = rotating(decode, weights), rotating(copy, dense)
        return self._compare("decode", dtype, None, *calls, moved)

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
        ours = rotating(lambda packed: self.quantizer.matmul(x, packed, transpose), weights)
        plain = rotating(lambda W: torch.mm(operand, W if transpose else W.t()), dense)
        return self._compare("transposed" if transpose else "forward", dtype, rows, ours, plain)

    def _lora_step(
        self, weights: list[PackedWeight], dense: list[Tensor], dtype: str
    ) -> Comparison:
        """Y and the gradients dX, dA, dB, for the largest number of rows."""
        rows, (out_features, in_features) = max(self.config.rows), self.config.shape
        A, B = self._normal(RANK, in_features), self._normal(out_features, RANK)
        A, B = A.requires_grad_(), B.requires_grad_()
        x, dY = self._normal(rows, in_features), self._normal(rows, out_features)

        def step(dtype: torch.dtype, layer: Callable[[Tensor, Any], Tensor]) -> Callable[..., None]:
            leaf, gradient = x.to(dtype, copy=True).requires_grad_(), dY.to(dtype)

            def run(weight: Any) -> None:
                with torch.enable_grad():
                    torch.autograd.grad(layer(leaf, weight), (leaf, A, B), gradient)

            return run

        adapter: dict[str, Any] = {"A": A, "B": B, "scale": SCALE}
        ours = step(DTYPES[dtype], lambda x, p: lora_linear(x, p, **adapter))
        plain = step(dense[0].dtype, lambda x, W: dense_lora(x, W, A, B))
        frozen = [FrozenWeight(self.quantizer, packed) for packed in weights]
        calls = rotating(ours, frozen), rotating(plain, dense)
        return self._compare("lora_step", dtype, rows, *calls)

    def _compare(
        self,
        kind: str,
        dtype: str,
        rows: int | None,
        ours: Call,
        dense: Call,
        moved: tuple[int, int] | None = None,
    ) -> Comparison:
        size = "" if rows is None else f", {rows} row{'s' * (rows > 1)}"
        calls = {"ours": ours, "dense": dense}
        with self._reporting(f"{kind} in {dtype}{size}"), torch.no_grad():
            timings = in_turns(calls, seconds=self.config.seconds, device=self.device)
        return Comparison(kind, dtype, rows, **timings, moved=moved)

    def _packed(self, weight: Tensor) -> PackedWeight:
        calibration = None
        if self.quantizer.spec.calibration != "none":
            columns = weight.shape[1]
            calibration = Calibration(torch.eye(columns, device=self.device), columns)
        with torch.no_grad():
            return self.quantizer.pack(weight, calibration)

    def _warm_up_packing(self) -> None:
        """Pack a small weight, so that the time excludes compiling."""
        out_features, in_features = self.config.shape
        for parts in (16, 8, 4, 2):
            small = (out_features // parts, in_features // parts)
            if min(small) > 0 and accepts(self.quantizer, small):
                self._packed(SPREAD * self._normal(*small))
                return

    def _dense(self, dtype: torch.dtype) -> list[Tensor]:
        weight = (SPREAD * self._normal(*self.config.shape)).to(dtype)
        return self._copies(weight, weight.nbytes, weight.clone)

    def _copies(self, first: Any, nbytes: int, copy: Callable[[], Any]) -> list[Any]:
        """Enough copies to keep caches cold; one on CUDA, whose clock overwrites them."""
        count = 1 if self.device.type == "cuda" else cold_copies(nbytes)
        return [first, *(copy() for _ in range(count - 1))]

    def _normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator).to(self.device)

    @contextmanager
    def _reporting(self, measurement: str) -> Iterator[None]:
        """Report progress, and turn a failure into a WorkError that names the measurement."""
        self.progress(measurement, self.done, self.total)
        try:
            yield
        except ModuLoRAError:
            raise
        except Exception as error:  # a plugin may raise anything
            name = self.quantizer.spec.name
            message = " ".join(f"{type(error).__name__}: {error}".split())
            raise WorkError(
                f"bench of {name}: {measurement}: expected it to work, got {message}; "
                f"`modulora conformance {name}` finds the fault"
            ) from error
        self.done += 1
        self.progress(measurement, self.done, self.total)


def dense_lora(x: Tensor, W: Tensor, A: Tensor, B: Tensor) -> Tensor:
    """Y = X Wᵀ + s (X Aᵀ) Bᵀ, as PEFT computes it: the adapter in its own dtype."""
    y = F.linear(x, W)
    return y + (SCALE * F.linear(F.linear(x.to(A.dtype), A), B)).to(y.dtype)
