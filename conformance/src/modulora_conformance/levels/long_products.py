"""L3: products of weights with more rows or columns than 16 bits count."""

from __future__ import annotations

import pytest
import torch

from modulora_conformance.cases import both_ways, tile
from modulora_conformance.checks import Level, needs
from modulora_conformance.levels.accuracy import long_packed
from modulora_conformance.levels.products import FORWARD, TRANSPOSED
from modulora_conformance.levels.tiles import OWNED
from modulora_conformance.oracle import dense, product_error
from modulora_conformance.results import Measurements
from modulora_conformance.tolerances import PRODUCT
from modulora_core.spec import Quantizer

BEFORE = (
    FORWARD,
    TRANSPOSED,
    OWNED,
    "test_long_weights_keep_the_error",
    "test_rows_of_a_ragged_weight_equal_the_whole",
    "test_products_of_a_large_weight_equal_the_dense_ones",
)
INDICES = "test_products_of_long_weights_equal_the_dense_ones"


class LongProducts(Level):
    """Offsets are wide enough, and sums have enough digits."""

    level, title = "L3", "products"

    @pytest.mark.parametrize("form", ["few rows", "few columns"])
    @needs(*BEFORE)
    def test_products_of_long_weights_equal_the_dense_ones(
        self, quantizer: Quantizer, measurements: Measurements, form: str
    ) -> None:
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
    def test_long_sums_keep_their_precision(
        self, quantizer: Quantizer, measurements: Measurements, form: str, dtype: torch.dtype
    ) -> None:
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
