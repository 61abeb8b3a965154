"""Checks CPU kernels that numba compiles, for faults that Python code cannot have.

They are not part of a certificate. A plugin subclasses them next to the kit::

    class TestKernels(CompiledKernels):
        @pytest.fixture
        def quantizers(self):
            return [Mine(Options(bits=bits)) for bits in (2, 4)]
"""

from __future__ import annotations

import platform
import sys
from collections.abc import Sequence
from typing import ClassVar

import pytest
import torch
from torch import Tensor

from modulora_conformance.cases import both_ways, fit, gaussian, pack, tile
from modulora_conformance.changes import same_bits
from modulora_conformance.elsewhere import (
    elsewhere,
    packing_share,
    request,
    results,
)
from modulora_conformance.fixtures import without_kernels
from modulora_conformance.oracle import product_error, tile_error
from modulora_conformance.tolerances import PRODUCT
from modulora_core.spec import PackedWeight, Quantizer

SHAPES = ((1, 1), (1, 16), (3, 129), (5, 2100), (9, 576))
"""Parts of a vector, whole vectors, and rows that end anywhere in a byte."""

_AVX2 = "+avx2,+avx,+fma,+bmi,+bmi2,+popcnt,+sse4.2,-avx512f"

INSTRUCTIONS: dict[str, tuple[str, dict[str, str]]] = {
    "avx2": ("avx2", {"NUMBA_CPU_NAME": "haswell", "NUMBA_CPU_FEATURES": _AVX2}),
    "neither": ("sse2", {"NUMBA_CPU_NAME": "generic"}),
}
"""A feature that the processor must have, and the variables that limit numba to it."""

on_linux = pytest.mark.skipif(sys.platform != "linux", reason="uses /proc and mprotect")
on_x86 = pytest.mark.skipif(
    platform.machine() not in ("x86_64", "AMD64"), reason="instruction sets of x86"
)


class CompiledKernels:
    """Subclass this in a test file, as ``Test...``, with the fixture ``quantizers``.

    Attributes:
        rounding: the most that a compiled tile differs from plain torch's, as a share of the
            largest magnitude. 0 means the same bits. A tile that is a sum needs more.
        packing_share: the most memory of packing a large weight, its own bytes too, in units of the
            fp32 weight. None if packing takes too long for a test.
        instruction_sets: whether a kernel is written for certain processors, or the names of
            :data:`INSTRUCTIONS` to compile it for. Code for other processors is then compared too,
            which takes 10 to 30 seconds each.
        loops_of_core: whether all products, except a product of one row, are the core's loops
            around a decoder (:class:`modulora_kernels.cpu.CPUKernels`). Code for other
            processors then decodes tiles and multiplies one row. NF4's tests multiply all ways.
    """

    rounding: ClassVar[float] = 0.0
    packing_share: ClassVar[float | None] = None
    instruction_sets: ClassVar[bool | tuple[str, ...]] = False
    loops_of_core: ClassVar[bool] = False

    @pytest.fixture
    def quantizers(self) -> Sequence[Quantizer]:
        pytest.fail(
            f"{type(self).__name__}: expected a fixture `quantizers`, a list, got none",
            pytrace=False,
        )

    @pytest.fixture
    def weights(self, quantizers: Sequence[Quantizer]) -> list[tuple[Quantizer, PackedWeight]]:
        """The weights to decode. Override it with weights that hold every code."""
        return [(q, pack(q, gaussian(fit(q, *shape), 0))) for q in quantizers for shape in SHAPES]

    def test_products_do_not_depend_on_the_number_of_threads(self, quantizers):
        """If this fails: each thread has its own sum, so that another machine gives other bits.

        Split sums into a fixed number of parts: :data:`modulora_kernels.PARTIAL_SUMS`.
        """
        before = torch.get_num_threads()
        for quantizer in quantizers:
            packed = pack(quantizer, gaussian(fit(quantizer, 96, 700), 0))
            for transpose, x in both_ways(packed, 3):
                products = []
                for count in (1, 2):
                    torch.set_num_threads(count)
                    products.append(quantizer.matmul(x, packed, transpose))
                torch.set_num_threads(before)
                assert torch.equal(*products), f"{dict(packed.metadata)}, {transpose=}"

    @on_linux
    def test_kernels_read_nothing_beyond_the_last_byte(self, weights, monkeypatch):
        """If this fails with exit code -11: a kernel reads beyond the end of a packed tensor."""
        self._compare(weights, monkeypatch)

    @on_linux
    @on_x86
    @pytest.mark.slow
    @pytest.mark.parametrize("instructions", INSTRUCTIONS)
    def test_other_instruction_sets_give_the_same_values(self, weights, instructions, monkeypatch):
        """If this fails: code for one kind of processor disagrees with code for another."""
        chosen = INSTRUCTIONS if self.instruction_sets is True else self.instruction_sets or ()
        if instructions not in chosen:
            pytest.skip("no kernel is written for such processors")
        feature, environment = INSTRUCTIONS[instructions]
        binding = pytest.importorskip("llvmlite.binding")
        if not binding.get_host_cpu_features().get(feature, False):
            pytest.skip(f"this processor has no {feature}")
        if instructions == "neither":  # the core's tests have its operations without both
            first = weights[0][0].options
            weights = [each for each in weights if each[0].options == first]
        self._compare(weights, monkeypatch, **environment)

    @on_linux
    @pytest.mark.parametrize("compiled", [True, False], ids=["kernels", "reference"])
    def test_packing_a_large_weight_takes_little_memory(self, quantizers, compiled):
        """If this fails: packing holds several fp32 copies of the weight. Pack some rows at a
        time."""
        if self.packing_share is None:
            pytest.skip("packing a large weight takes too long")
        name, options = quantizers[0].spec.name, quantizers[0].options.model_dump(mode="json")
        assert elsewhere(packing_share, name, options, compiled) <= self.packing_share

    def _compare(
        self,
        weights: list[tuple[Quantizer, PackedWeight]],
        monkeypatch: pytest.MonkeyPatch,
        **environment: str,
    ) -> None:
        """Compare the tiles and products of another process with plain torch's."""
        requests = [request(q, packed, torch.float32) for q, packed in weights]
        for asked in requests:  # there may be other kernels for one row
            one = {f"{name}.one row": x[:1].clone() for name, x in asked.inputs.items()}
            if environment and self.loops_of_core:
                asked.inputs.clear()
                del one["dY.float32.one row"]
            asked.inputs.update(one)
        found = elsewhere(results, requests, True, **environment)
        without_kernels(monkeypatch)
        for (quantizer, packed), asked, tensors in zip(weights, requests, found, strict=True):
            self._check(quantizer, packed, asked.inputs, tensors)

    def _check(
        self,
        quantizer: Quantizer,
        packed: PackedWeight,
        given: dict[str, Tensor],
        found: dict[str, Tensor],
    ) -> None:
        case = f"{packed.shape} with {dict(packed.metadata)}"
        W = tile(quantizer, packed)
        for name, exact in (("tile", W), ("part", W[W.shape[0] // 3 :])):
            value = found[f"{name}.float32"]
            if self.rounding == 0:
                assert same_bits(value, exact), f"{case}: expected plain torch's bits, got others"
            else:
                assert tile_error(value, exact) <= self.rounding, case
        for name, x in given.items():
            operand, _, rest = name.partition(".")
            transpose = operand == "dY"
            y = found[f"{'transposed' if transpose else 'product'}.{rest}"]
            error = product_error(y, x, W.double(), transpose)
            assert error <= PRODUCT[torch.float32].value, f"{case}, {name}: an error of {error:.3g}"
