"""What ``gpu.py`` has done in processes of their own: for each of our quantizers, and for the dense and the peers' ways."""

from __future__ import annotations

import contextlib
import gc
import time
from collections.abc import Iterator, Sequence
from typing import Any

import gpu_models
import torch
from gpu_models import Recipe
from gpu_parity import ODD_SHAPES, ROWS, Truth, check, pack, truths
from modulora_conformance.bench.quantizer_bench import ROWS as BENCH_ROWS
from modulora_conformance.bench.quantizer_bench import BenchConfig, measure_quantizer
from modulora_conformance.cases import fit, gaussian
from torch import Tensor, nn
from turns import NotMeasuredError, reason

from modulora_core import registry
from modulora_core.registry import Choice
from modulora_core.spec import Calibration, PackedWeight, Quantizer, QuantizerSpec

LARGE_SHAPES = ((4096, 4096), (2048, 2048), (1024, 1024))
"""Of the layers that are timed: the first that the quantizer packs in the time there is."""

LAYER_DTYPES = ("bfloat16", "float16", "float32")

COMPARISONS = len(LAYER_DTYPES) * (2 + 2 * len(BENCH_ROWS))
"""That a layer takes: decoding, products both ways, a LoRA step."""


def create(words: str) -> Quantizer:
    """``NAME[:OPTION=VALUE,...]``."""
    return Choice.parse(words).create()


def promised() -> list[str]:
    """Every configuration that an installed quantizer makes promises for."""
    found = [
        entry.spec
        for entry in registry.entries()
        if entry.status == "ok" and entry.spec is not None
    ]
    return [
        spec.name + ":"[: bool(promise.options)] + ",".join(f"{key}={value}" for key, value in promise.options.items())
        for spec in found
        for promise in spec.promises
    ]  # fmt: skip


class QuantizerJob:
    """One of ours on one device.

    Weights for :meth:`layer` and :meth:`model` are packed by :meth:`large_parity` and :meth:`prepare`, which need no quiet machine.
    """

    def __init__(self, words: str, device: str, threads: int | None = None) -> None:
        if threads is not None:
            torch.set_num_threads(threads)
        _exact_products()
        self.quantizer = create(words)
        self.device = torch.device(device)
        self.large: PackedWeight | None = None
        self.of_model: dict[tuple[int, int], PackedWeight] = {}
        self.rate = 0.0  # of packing, seconds a weight
        self.unpacked = ""  # why packing on the device failed

    def parity(
        self,
        sent: Sequence[tuple[Any, ...]] | None,
        shapes: Sequence[tuple[int, int]] = ODD_SHAPES,
        rows: Sequence[int] = ROWS,
    ) -> list[dict[str, Any]]:
        """Check weights that came from another process, or of these shapes, which this one packs on its CPU."""
        given = (
            truths(self.quantizer, shapes)
            if sent is None
            else [Truth.received(*each) for each in sent]
        )
        with _freed(self.device):
            return [
                row for truth in given for row in check(self.quantizer, truth, self.device, rows)
            ]

    def large_parity(
        self,
        allowance: float,
        shapes: Sequence[tuple[int, int]] = LARGE_SHAPES,
        rows: Sequence[int] = ROWS,
    ) -> dict[str, Any]:
        """The same for a layer as large as a language model's: the first of ``shapes`` that is packed on the device in about
        ``allowance`` seconds.

        Returns:
            ``{"shape", "pack_seconds", "checks"}``.
        """
        with _freed(self.device):
            return self._large_parity(allowance, shapes, rows)

    def _large_parity(
        self, allowance: float, shapes: Sequence[tuple[int, int]], rows: Sequence[int]
    ) -> dict[str, Any]:
        small = fit(self.quantizer, *(min(512, size) for size in shapes[-1]))
        self._pack(small)  # compiles
        self._pack(small)
        for shape in shapes:
            fitting = fit(self.quantizer, *shape)
            if self._foreseen(fitting) <= allowance or shape == shapes[-1]:
                break
        self.large = self._pack(fitting)
        seconds, truth = self._foreseen(fitting), Truth.of(self.quantizer, self.large)
        checks = [{"check": "pack", "shape": list(fitting), "dtype": "float32", "error": None, "limit": None,
                   "passed": not self.unpacked, "reason": self.unpacked}]  # fmt: skip
        checks += check(self.quantizer, truth, self.device, rows)
        self.large = self.large.to("cpu")  # until it is this process's turn
        return {"shape": list(fitting), "pack_seconds": seconds, "checks": checks}

    def prepare(self, recipe: Recipe, allowance: float) -> None:
        """Pack a weight of each shape that the model has."""
        shapes = gpu_models.shapes(recipe)
        foreseen = sum(self._foreseen(shape) for shape in shapes)
        if foreseen > allowance:
            raise NotMeasuredError(
                f"packing its weights takes about {foreseen:.0f} s: more --seconds"
            )
        with _freed(self.device):
            self.of_model = {shape: self._pack(shape).to("cpu") for shape in shapes}

    def layer(self, seconds: float, shape: tuple[int, int]) -> dict[str, Any]:  # noqa: ARG002  # the peer's has one
        """:func:`modulora_conformance.bench.quantizer_bench.measure_quantizer` on the device."""
        if self.large is None:
            raise NotMeasuredError("no weight was packed")
        _choose_alone(self.device)
        with _freed(self.device):
            return _layer(self.quantizer, self.large.to(self.device), seconds)

    def model(self, recipe: Recipe, seconds: float) -> dict[str, Any]:
        if not self.of_model:
            raise NotMeasuredError("its weights weren't packed in time: more --seconds")
        _choose_alone(self.device)
        with _freed(self.device):
            return gpu_models.measure(self._model(recipe), recipe, self.device, seconds)

    def _model(self, recipe: Recipe) -> nn.Module:
        return gpu_models.packed_model(
            recipe, self.device, self.quantizer, {shape: packed.to(self.device) for shape, packed in self.of_model.items()}
        )  # fmt: skip

    def _foreseen(self, shape: tuple[int, int]) -> float:
        """Seconds that packing takes: at least as many more as the last time as there are more weights."""
        return self.rate * shape[0] * shape[1]

    def _pack(self, shape: tuple[int, int]) -> PackedWeight:
        weight = gaussian(shape, 1)
        start = time.perf_counter()
        try:
            packed = pack(self.quantizer, weight.to(self.device))
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
        except (
            Exception
        ) as error:  # whatever a plugin raises; what follows can be measured all the same
            self.unpacked = reason(error)
            packed = pack(self.quantizer, weight).to(self.device)
        self.rate = (time.perf_counter() - start) / (shape[0] * shape[1])
        return packed


class DenseJob:
    """The model as it is, with PEFT's adapters."""

    def __init__(self, device: str) -> None:
        self.device = torch.device(device)

    def model(self, recipe: Recipe, seconds: float) -> dict[str, Any]:
        with _freed(self.device):
            return gpu_models.measure(gpu_models.dense_lora_model(recipe, self.device), recipe, self.device, seconds)  # fmt: skip


class BitsAndBytesJob:
    """bitsandbytes' NF4: its kernels by themselves, and its layers with PEFT's adapters."""

    def __init__(self, device: str) -> None:
        try:
            import bitsandbytes  # noqa: F401
        except Exception as error:  # it raises what its libraries raise
            raise NotMeasuredError(
                f"bitsandbytes isn't installed or fails to start: {reason(error)}"
            ) from error
        _exact_products()
        self.device = torch.device(device)

    def layer(self, seconds: float, shape: tuple[int, int]) -> dict[str, Any]:
        quantizer, weight = _BitsAndBytes(), gaussian(shape, 1)
        with _freed(self.device):
            return _layer(quantizer, quantizer.pack(weight.to(self.device)), seconds)

    def model(self, recipe: Recipe, seconds: float) -> dict[str, Any]:
        with _freed(self.device):
            return gpu_models.measure(gpu_models.bitsandbytes_model(recipe, self.device), recipe, self.device, seconds)  # fmt: skip


def _layer(quantizer: Quantizer, packed: PackedWeight, seconds: float) -> dict[str, Any]:
    config = BenchConfig(
        shape=packed.shape, dtypes=LAYER_DTYPES, device=packed.device, seconds=seconds
    )
    return measure_quantizer(quantizer, config, packed=packed).to_json()


def _exact_products() -> None:
    """fp32 is multiplied in fp32, also where the environment asks for TF32, as some images do: values are compared."""
    torch.set_float32_matmul_precision("highest")


def _choose_alone(device: torch.device) -> None:
    """What was the fastest while other processes used the device needn't be that now."""
    if device.type == "cuda":
        from modulora_core.kernels.triton.launching import forget_choices

        forget_choices()


@contextlib.contextmanager
def _freed(device: torch.device) -> Iterator[None]:
    """Give the device's memory back at the end: other processes wait for their turn on it."""
    try:
        yield
    finally:
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()


class _BitsAndBytes(Quantizer):
    """bitsandbytes' NF4 kernels in the place of a quantizer's, so that the same code measures them."""

    spec = QuantizerSpec(name="bitsandbytes-nf4", summary="bitsandbytes' own kernels", location="gpu_jobs:_BitsAndBytes", protocol=1,
                         bits=(4,))  # fmt: skip

    def pack(self, weight: Tensor, calibration: Calibration | None = None) -> PackedWeight:  # noqa: ARG002
        from bitsandbytes import functional

        codes, state = functional.quantize_4bit(weight.contiguous(), quant_type="nf4")
        shape = (weight.shape[0], weight.shape[1])
        return PackedWeight(
            self.spec.name, 1, shape, {"codes": codes, "absmax": state.absmax, "levels": state.code}
        )

    def dequantize_tile(
        self, packed: PackedWeight, rows: tuple[int, int], dtype: torch.dtype
    ) -> Tensor:
        from bitsandbytes import functional

        whole: Tensor = functional.dequantize_4bit(
            packed.tensors["codes"], self._state(packed, dtype)
        )
        return whole[rows[0] : rows[1]]

    def matmul(self, x: Tensor, packed: PackedWeight, transpose: bool = False) -> Tensor:
        """Its layers' forward; in their backward the weight is dequantized."""
        from bitsandbytes import matmul_4bit

        if transpose:
            return x @ self.dequantize_tile(packed, (0, packed.shape[0]), x.dtype)
        product: Tensor = matmul_4bit(x, packed.tensors["codes"].t(), self._state(packed, x.dtype))
        return product

    def _state(self, packed: PackedWeight, dtype: torch.dtype) -> Any:
        from bitsandbytes.functional import QuantState

        return QuantState(absmax=packed.tensors["absmax"], shape=torch.Size(packed.shape), code=packed.tensors["levels"], blocksize=64,
                          quant_type="nf4", dtype=dtype)  # fmt: skip
