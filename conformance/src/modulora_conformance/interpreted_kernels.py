"""Triton kernels in Triton's interpreter, value by value against a plugin's reference.

Triton decides when a kernel is decorated whether it is interpreted, so these tests take a process of their own.
A plugin's test file runs them::

    def test_interpreted_kernels_give_the_values_of_the_reference():
        run_interpreted(Path(__file__).with_name("check_mine_interpreted.py"))

and that file, which pytest doesn't collect by itself, holds a subclass::

    class TestInterpreted(InterpretedKernels):
        @pytest.fixture(params=[...])
        def weight(self, request):
            return quantizer, packed, truth
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from modulora_conformance.cases import inputs
from modulora_conformance.fresh_process import run_python
from modulora_conformance.oracle import product_error
from modulora_conformance.tolerances import PRODUCT
from modulora_core import kernels
from modulora_core.spec import PackedWeight, Quantizer

Weight = tuple[Quantizer, PackedWeight, Tensor]
"""A quantizer, a packed weight, and its Ŵ by the reference alone, fp32 ``[out, in]``."""

MANY_ROWS = 33
"""More than any few-row kernel takes: tiles are multiplied."""


def run_interpreted(check: Path, timeout: float = 600) -> None:
    """Run the tests in ``check`` with ``TRITON_INTERPRET=1``; fails with what pytest said where one of them fails."""
    done = run_python(
        "-m", "pytest", "-q", "-p", "no:cacheprovider", str(check), cwd=Path.cwd(), timeout=timeout,
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]


def poison_new_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on ``torch.empty`` gives NaN, so that what a kernel forgot to write isn't a zero by chance."""
    empty = torch.empty

    def poisoned(*shape: Any, **options: Any) -> Tensor:
        made: Tensor = empty(*shape, **options)
        return made.fill_(torch.nan) if made.is_floating_point() else made

    monkeypatch.setattr(torch, "empty", poisoned)


class InterpretedKernels:
    """Subclass this as ``Test...`` and give the fixture ``weight``, a :data:`Weight`, for each case: options, and odd shapes."""

    @pytest.fixture
    def weight(self) -> Weight:
        pytest.fail(f"{type(self).__name__}: expected a fixture `weight`, got none", pytrace=False)

    @pytest.fixture(autouse=True)
    def _nothing_is_left_unwritten(self, weight: Weight, monkeypatch: pytest.MonkeyPatch) -> None:
        """The weight is packed first."""
        del weight
        poison_new_memory(monkeypatch)

    def test_tensors_on_the_cpu_are_given_to_the_kernels(self, weight: Weight) -> None:
        """If this fails: what follows tests something else."""
        assert kernels.triton_is_interpreted()
        assert "cuda" in weight[0].spec.devices

    def test_tiles_are_the_reference_bit_for_bit(self, weight: Weight) -> None:
        """If this fails: a kernel decodes other values, leaves some unwritten, or rounds twice."""
        quantizer, packed, truth = weight
        rows = packed.shape[0]
        for dtype, (start, stop) in (
            (torch.float32, (0, rows)), (torch.float32, (rows // 2, rows // 2 + 1)), (torch.bfloat16, (1, rows)),
            (torch.float16, (0, rows)), (torch.float64, (rows // 3, rows)), (torch.float32, (rows, rows)),
        ):  # fmt: skip
            tile = quantizer.dequantize_tile(packed, (start, stop), dtype)
            assert torch.equal(tile, truth[start:stop].to(dtype)), (dtype, start, stop)

    @pytest.mark.parametrize(
        ("rows", "dtype"),
        [(1, torch.float32), (3, torch.bfloat16), (17, torch.float16), (MANY_ROWS, torch.float32), (1, torch.float64)],
        ids=str,
    )  # fmt: skip
    def test_products_are_those_of_the_reference(
        self, weight: Weight, rows: int, dtype: torch.dtype
    ) -> None:
        """If this fails: a product is wrong: of one row, of a few, on tensor cores, or by tiles."""
        quantizer, packed, truth = weight
        for transpose in (False, True):
            x = inputs((rows,), packed.shape[0 if transpose else 1], dtype, 1)
            y = quantizer.matmul(x, packed, transpose)
            assert y.dtype == dtype
            error = product_error(y, x, truth.double(), transpose)
            assert error <= PRODUCT[dtype].value, (packed.shape, transpose, PRODUCT[dtype].reason)
