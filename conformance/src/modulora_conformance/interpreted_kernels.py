"""Compares Triton kernels in Triton's interpreter with a plugin's reference, value by value.

Triton reads ``TRITON_INTERPRET`` once, so these tests run in their own process. A test of the
plugin
starts it::

    def test_interpreted_kernels_give_the_values_of_the_reference():
        run_interpreted(Path(__file__).with_name("check_mine_interpreted.py"))

pytest does not collect that file by itself. It holds a subclass::

    class TestInterpreted(InterpretedKernels):
        @pytest.fixture(params=[...])
        def weight(self, request):
            return quantizer, packed, truth
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import modulora_kernels as kernels
import pytest
import torch
from torch import Tensor

from modulora_conformance.cases import both_ways, tile
from modulora_conformance.oracle import product_error
from modulora_conformance.tolerances import PRODUCT
from modulora_core.spec import PackedWeight, Quantizer

Weight = tuple[Quantizer, PackedWeight, Tensor]
"""A quantizer, a packed weight, and its Ŵ by the reference alone, fp32 ``[out, in]``."""

MANY_ROWS = 33
"""More rows than a kernel for few rows takes: the product multiplies tiles."""


def run_interpreted(check: Path, timeout: float = 600) -> None:
    """Run the tests in ``check`` with ``TRITON_INTERPRET=1``. Fails with pytest's whole output."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(check)]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=timeout)
    assert done.returncode == 0, done.stdout + done.stderr


def poison_new_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let ``torch.empty`` return NaN, so that an unwritten value does not pass as a zero."""
    empty = torch.empty

    def poisoned(*shape: Any, **options: Any) -> Tensor:
        made: Tensor = empty(*shape, **options)
        return made.fill_(torch.nan) if made.is_floating_point() else made

    monkeypatch.setattr(torch, "empty", poisoned)


class InterpretedKernels:
    """Subclass this as ``Test...`` with the fixture ``weight``, for odd shapes and all options."""

    @pytest.fixture
    def weight(self) -> Weight:
        pytest.fail(f"{type(self).__name__}: expected a fixture `weight`, got none", pytrace=False)

    @pytest.fixture(autouse=True)
    def _poisoned(self, weight: Weight, monkeypatch: pytest.MonkeyPatch) -> None:
        del weight  # it is packed first
        poison_new_memory(monkeypatch)

    def test_tensors_on_the_cpu_are_given_to_the_kernels(self, weight):
        """If this fails: the other tests do not test the Triton kernels."""
        assert kernels.triton_is_interpreted()
        assert "cuda" in weight[0].spec.devices

    def test_tiles_are_the_reference_bit_for_bit(self, weight):
        """If this fails: a kernel decodes other values, leaves some unwritten, or rounds twice."""
        quantizer, packed, truth = weight
        rows = packed.shape[0]
        for dtype, start, stop in (
            (torch.float32, 0, rows),
            (torch.float32, rows // 2, rows // 2 + 1),
            (torch.bfloat16, 1, rows),
            (torch.float16, 0, rows),
            (torch.float64, rows // 3, rows),
            (torch.float32, rows, rows),
        ):
            found = tile(quantizer, packed, dtype, start, stop)
            assert torch.equal(found, truth[start:stop].to(dtype)), (dtype, start, stop)

    @pytest.mark.parametrize(
        ("rows", "dtype"),
        [
            (1, torch.float32),
            (3, torch.bfloat16),
            (17, torch.float16),
            (MANY_ROWS, torch.float32),
            (1, torch.float64),
        ],
        ids=str,
    )
    def test_products_are_those_of_the_reference(self, weight, rows, dtype):
        """If this fails: a product of one row, of few, on tensor cores, or by tiles is wrong."""
        quantizer, packed, truth = weight
        for transpose, x in both_ways(packed, rows, dtype=dtype, seed=1):
            y = quantizer.matmul(x, packed, transpose)
            assert y.dtype == dtype
            error = product_error(y, x, truth.double(), transpose)
            assert error <= PRODUCT[dtype].value, (packed.shape, transpose, PRODUCT[dtype].reason)
