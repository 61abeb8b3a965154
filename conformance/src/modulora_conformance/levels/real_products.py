"""L3: products with long weights, with weights as large as real layers, and with any rows of x."""

from __future__ import annotations

import pytest
import torch

from modulora_conformance import real
from modulora_conformance.cases import both_ways, tile
from modulora_conformance.checks import Level, needs
from modulora_conformance.levels.accuracy import long_packed
from modulora_conformance.levels.products import ALONE, FORWARD, TRANSPOSED
from modulora_conformance.levels.real_weights import COMMON, REAL, REAL_TILES
from modulora_conformance.levels.tiles import OWNED
from modulora_conformance.oracle import dense, product_error
from modulora_conformance.real import Outcome
from modulora_conformance.results import Measurements
from modulora_conformance.tolerances import PRODUCT

ANY_ROWS = "test_products_of_any_number_of_rows_equal_the_dense_ones"
UNCHANGED = "test_any_number_of_rows_is_left_unchanged"
RAGGED = "test_products_of_ragged_weights_equal_the_dense_ones"
LARGE = "test_products_of_a_large_weight_equal_the_dense_ones"

BEFORE = (
    FORWARD,
    TRANSPOSED,
    OWNED,
    "test_long_weights_keep_the_error",
    "test_rows_of_a_ragged_weight_equal_the_whole",
    "test_products_of_a_large_weight_equal_the_dense_ones",
)
REAL_LAYER = "test_products_of_a_real_layer_equal_the_dense_ones"
INDICES = "test_products_of_long_weights_equal_the_dense_ones"


class RealProducts(Level):
    """Products have the same error at the sizes of real layers, for 1 to 4,097 rows of x.

    x is fp32, and with some numbers of rows bf16 and fp16 too.
    """

    level, title = "L3", "products"

    @needs(*ALONE)
    def test_any_number_of_rows_is_left_unchanged(self, quantizer):
        """If this fails: for some number of rows, `matmul` writes to x, which autograd saved."""
        _check_no_fault(real.many(quantizer), real.INPUT)

    @needs(*ALONE)
    def test_products_of_any_number_of_rows_are_the_callers(self, quantizer):
        """If this fails: for some number of rows, the next product overwrites the result.

        A graph may still need it. Return new memory.
        """
        _check_no_fault(real.many(quantizer), real.CALLERS)

    @needs(FORWARD, TRANSPOSED, UNCHANGED)
    def test_products_of_any_number_of_rows_equal_the_dense_ones(self, quantizer, measurements):
        """If this fails: between 1 and 4,097 rows of x, some number has a wrong product.

        Kernels have paths for 1 row, for blocks of 16, 32 or 64, and for long texts. Look at the
        rows that do not fill a block.
        """
        _check_errors(real.many(quantizer), "product of any number of rows", measurements)

    @needs(ANY_ROWS, COMMON, RAGGED, LARGE)
    def test_products_of_layers_with_common_sides_equal_the_dense_ones(
        self, quantizer, measurements
    ):
        """If this fails: a weight with a side of 256, 896, 1024 or 4095 has a wrong product.

        A kernel has a path for sides that its block divides, and omits or repeats an end.
        """
        for found in real.sides(quantizer):
            _check_errors(found, "product with common sides", measurements)
            _check_no_fault(found, real.INPUT)

    @needs(ANY_ROWS, REAL, REAL_TILES, RAGGED, LARGE)
    def test_products_of_a_real_layer_equal_the_dense_ones(self, quantizer, measurements):
        """If this fails: with 17 million elements in Ŵ, a product is wrong.

        An index or a size is a float, a byte or 16 bits, or a tile of megabytes is swapped, stale
        or left out.
        """
        _check_errors(real.big(quantizer), "product of a real layer", measurements)
        _check_no_fault(real.big(quantizer), real.INPUT)

    @pytest.mark.parametrize("form", ["few rows", "few columns"])
    @needs(*BEFORE)
    def test_products_of_long_weights_equal_the_dense_ones(self, quantizer, measurements, form):
        """If this fails: a kernel's index of rows or columns does not fit its dtype.

        Use int64 for offsets: many vocabularies have more rows than 16 bits count.
        """
        weight = long_packed(quantizer, form)
        W = dense(quantizer, weight)
        for rows in (1, 40):
            for transpose, x in both_ways(weight, rows, seed=28):
                error = product_error(quantizer.matmul(x, weight, transpose), x, W, transpose)
                case, limit = f"{rows} rows, {transpose=}", PRODUCT[torch.float32].value
                measurements.at_most(f"product of {form}", error, limit, case=case)
        part, whole = tile(quantizer, weight, torch.float32, 1), tile(quantizer, weight)
        assert torch.equal(part, whole[1:]), f"rows from 1 of {form}: expected the bits of Ŵ"

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
    @pytest.mark.parametrize("form", ["few rows", "few columns"])
    @needs(INDICES)
    def test_long_sums_keep_their_precision(self, quantizer, measurements, form, dtype):
        """If this fails: `matmul` adds partial sums in 16 bits, even if each is a block's.

        Random terms cancel and hide it: here x is a row or column of Ŵ, so that all terms are
        positive. Add in fp32, and round once.
        """
        weight = long_packed(quantizer, form)
        W, transpose = dense(quantizer, weight), form == "few columns"
        x = (W.T if transpose else W) / W.abs().max()
        for rows in (1, 40):
            alike = x[:1].expand(rows, -1).to(dtype).contiguous()
            error = product_error(quantizer.matmul(alike, weight, transpose), alike, W, transpose)
            name = f"product of {form} in {dtype}"
            measurements.at_most(name, error, PRODUCT[dtype].value / 2, case=f"{rows} rows")


def _check_errors(found: Outcome, name: str, measurements: Measurements) -> None:
    for error, dtype, case in found.errors:
        measurements.at_most(f"{name} in {dtype}", error, PRODUCT[dtype].value, case=case)


def _check_no_fault(found: Outcome, kind: str) -> None:
    assert kind not in found.faults, found.faults[kind][0]
