"""L7: paths that this machine does not take: another device, and no numba."""

from __future__ import annotations

import itertools
import re
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

import modulora_kernels as kernels
import pytest
import torch
from modulora_kernels import compiled
from torch import Tensor

from modulora_conformance.cases import (
    DTYPES,
    both_ways,
    fit,
    gaussian,
    identity,
    packed,
    tile,
)
from modulora_conformance.checks import Level, needs
from modulora_conformance.elsewhere import elsewhere, request, without_numba_results
from modulora_conformance.fake_device import OnCuda, fake_cuda, moved
from modulora_conformance.levels.accuracy import END, MARGIN, WIDTHS, usual_error
from modulora_conformance.levels.lookups import LOOKUP
from modulora_conformance.levels.packing import DETERMINISTIC
from modulora_conformance.levels.processes import READS
from modulora_conformance.levels.products import FORWARD, TRANSPOSED
from modulora_conformance.levels.tiles import OWNED
from modulora_conformance.oracle import dense, product_error, relative_error, tile_error
from modulora_conformance.results import HARDWARE, Measurements
from modulora_conformance.tolerances import PRODUCT, ROUNDING
from modulora_core.spec import Calibration, Quantizer

META = "test_the_meta_device_gives_shapes_and_dtypes"
VALUES = "test_a_device_without_kernels_gives_the_values_of_the_cpu"

SHAPE = (43, 116)


class OtherPaths(Level):
    """A device without kernels, and a machine without numba, give the same values."""

    level, title = "L7", "devices"

    @needs(META, FORWARD, TRANSPOSED, LOOKUP, OWNED, WIDTHS)
    def test_a_device_without_kernels_gives_the_values_of_the_cpu(
        self, quantizer: Quantizer, measurements: Measurements, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """If this fails: on a device that says it is CUDA, plain torch gives other values, or
        mixes devices.

        The device is a fake whose values are in the CPU's memory; kernels of the toolkit are off.
        Make each new tensor on ``packed.device`` or ``weight.device``.
        """
        _without_kernels(monkeypatch)
        weight = packed(quantizer, SHAPE)
        W, whole, ids = dense(quantizer, weight), tile(quantizer, weight), torch.tensor([[9, 0, 3]])
        with _on_fake_cuda(quantizer):
            on_cuda = weight.layout.fill({n: moved(t) for n, t in weight.tensors.items()})
            for dtype in DTYPES:
                found = _values(tile(quantizer, on_cuda, dtype, 1), f"a tile in {dtype}")
                limit = ROUNDING[dtype].value + PRODUCT[torch.float32].value
                error = tile_error(found, whole[1:])
                measurements.at_most(f"tile on another device in {dtype}", error, limit)
            rows = _values(quantizer.lookup(moved(ids), on_cuda, torch.float32), "a lookup")
            error, limit = tile_error(rows, whole[ids]), PRODUCT[torch.float32].value
            measurements.at_most("rows looked up on another device", error, limit)
            for n in (1, 3, 40):
                for transpose, x in both_ways(weight, n, seed=91):
                    case = f"a product of {n} rows, {transpose=}"
                    y = _values(quantizer.matmul(moved(x), on_cuda, transpose), case)
                    error = product_error(y, x, W, transpose)
                    measurements.at_most("product on another device", error, limit, case=case)
        assert torch.equal(tile(quantizer, weight), whole), (
            "after reading on another device: expected the same Ŵ on the CPU, got another"
        )

    @needs(VALUES, DETERMINISTIC)
    def test_a_weight_on_another_device_is_packed_there(
        self, quantizer: Quantizer, measurements: Measurements, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """If this fails: a weight on a device that says it is CUDA is not packed on it, or packed
        badly.

        Packed tensors must be on ``weight.device``, and so must tables and H.
        """
        _without_kernels(monkeypatch)
        weight = gaussian(fit(quantizer, 20, 48), 92)  # plain torch is slow
        required = quantizer.spec.calibration == "required"
        with _on_fake_cuda(quantizer):
            H = Calibration(moved(identity(weight.shape[1]).hessian), 1) if required else None
            found = quantizer.pack(moved(weight), H)
            here = {n: _values(t, f"packed tensor {n}") for n, t in found.tensors.items()}
        error = relative_error(tile(quantizer, found.layout.fill(here)), weight)
        limit = END * usual_error(quantizer) + MARGIN
        measurements.at_most("error of a weight packed on another device", error, limit)

    @needs(READS, DETERMINISTIC)
    def test_without_numba_the_values_are_the_same(
        self, quantizer: Quantizer, measurements: Measurements
    ) -> None:
        """If this fails: where numba is absent, the quantizer gives other values or none.

        Load kernels by :mod:`modulora_kernels`, which gives None there, and then run plain
        torch.
        """
        weight = packed(quantizer, SHAPE)
        asked = request(quantizer, weight, torch.float32)
        (found,) = elsewhere(without_numba_results, [asked])
        W, limit = dense(quantizer, weight), PRODUCT[torch.float32].value
        error = tile_error(found["tile.float32"], tile(quantizer, weight))
        measurements.at_most("tile without numba", error, limit)
        for name, x in asked.inputs.items():
            transpose = name.startswith("dY")
            y = found[f"{'transposed' if transpose else 'product'}.float32"]
            measurements.at_most("product without numba", product_error(y, x, W, transpose), limit)
        error = relative_error(found["own"], gaussian(weight.shape, 0))
        most = END * usual_error(quantizer) + MARGIN
        measurements.at_most("error of a weight packed without numba", error, most)


def _without_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the toolkit find no kernels: none runs on the fake device."""
    for module, name in itertools.product((kernels, compiled), ("load", "load_triton")):
        monkeypatch.setattr(module, name, lambda module, device: None)  # noqa: ARG005


@contextmanager
def _on_fake_cuda(quantizer: Quantizer) -> Iterator[None]:
    """Enter the fake device. Skip a check if a quantizer's own GPU kernels want a real one."""
    try:
        with fake_cuda():
            yield
    except Exception as error:
        if "cuda" in quantizer.spec.devices and _wants_a_gpu(error):
            pytest.skip(f"{HARDWARE}no CUDA device for kernels that the toolkit does not load")
        raise


def _wants_a_gpu(error: Exception) -> bool:
    """Whether torch missed a GPU, or Triton launched a kernel."""
    frames = (frame.f_globals["__name__"] for frame, _ in traceback.walk_tb(error.__traceback__))
    triton = any(name.partition(".")[0] == "triton" for name in frames)
    return triton or re.search("CUDA|NVIDIA", str(error)) is not None


def _values(found: Tensor, case: str) -> Tensor:
    """The values of a tensor that must be on the fake device."""
    assert isinstance(found, OnCuda), f"{case}: expected it on cuda, got it on {found.device}"
    return found.on_cpu
