"""L3: products in both directions equal the dense products with Ŵ."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import pad

from modulora_conformance.cases import (
    DTYPES,
    SETTINGS,
    both_ways,
    fit,
    gaussian,
    inputs,
    pack,
    packed,
    seeds,
    shapes,
    tile,
)
from modulora_conformance.changes import check_same_bytes, clone, unchanged_globals
from modulora_conformance.checks import Level, needs
from modulora_conformance.levels.lookups import LOOKUP
from modulora_conformance.levels.tiles import NARROW, RANGES
from modulora_conformance.oracle import dense, product_error
from modulora_conformance.results import Measurements
from modulora_conformance.tolerances import PRODUCT
from modulora_core.errors import ShapeError
from modulora_core.spec import Quantizer

FORWARD = "test_the_product_equals_the_dense_one"
TRANSPOSED = "test_the_transposed_product_equals_the_dense_one"
LEADING = "test_leading_dimensions_are_kept"
ALONE = (
    "test_the_input_of_a_product_is_unchanged",
    "test_a_product_leaves_the_packed_tensors_alone",
    "test_the_product_is_the_callers",
    "test_a_product_is_not_that_of_an_earlier_weight",
)

SHAPE = (24, 64)

ROWS = (1, 40)
"""Rows of x: kernels for few rows, and for many."""

RAGGED = (1, 31, 33, 63, 65, 127, 129, 257)
"""One more or less than common blocks."""

LARGE = {"wide": (301, 1035), "tall": NARROW}
"""Larger than a thread's share and a block of rows or columns; no power of two divides them."""


class Products(Level):
    """Products in both directions equal the dense products with the Ŵ of `dequantize_tile`."""

    level, title = "L3", "products"

    @needs(RANGES)
    def test_the_input_of_a_product_is_unchanged(self, quantizer):
        """If this fails: `matmul` writes to x, which autograd saved for the gradient of A."""
        found = packed(quantizer, SHAPE)
        for rows in ROWS:
            for transpose, x in both_ways(found, rows, seed=13):
                before = x.clone()
                quantizer.matmul(x, found, transpose).add_(1.0)
                assert torch.equal(x, before), f"x was changed ({rows} rows, {transpose=})"

    @needs(RANGES)
    def test_a_product_leaves_the_packed_tensors_alone(self, quantizer):
        """If this fails: `matmul` or `lookup` writes to packed tensors.

        Threads and copies of a model share them, and a file may back them. Work in your own memory.
        """
        found = packed(quantizer, (22, 64))
        before = clone(found)
        for rows in ROWS:
            for transpose, x in both_ways(found, rows, seed=16):
                quantizer.matmul(x, found, transpose)
                case = f"packed tensors after matmul of {rows} rows, {transpose=}"
                check_same_bytes(before, found, case)
        quantizer.lookup(torch.tensor([3, 1]), found, torch.float32)
        check_same_bytes(before, found, "packed tensors after lookup")

    @needs(RANGES)
    def test_the_product_is_the_callers(self, quantizer):
        """If this fails: `matmul` returns memory that it uses again.

        The next product overwrites the result, which the graph may still need.
        """
        found = packed(quantizer, SHAPE)
        for rows in ROWS:
            for transpose, x in both_ways(found, rows, seed=14):
                first = quantizer.matmul(x, found, transpose)
                before = first.clone()
                quantizer.matmul(-2 * x, found, transpose)
                assert torch.equal(first, before), (
                    f"a later product overwrote this one ({rows} rows, {transpose=})"
                )

    @pytest.mark.parametrize("rows", ROWS, ids=lambda n: f"{n} rows")
    @needs(RANGES)
    def test_a_product_is_not_that_of_an_earlier_weight(self, quantizer, rows):
        """If this fails: a cache for one weight is used for another weight of the same shape.

        Its key is a shape, an id, or an address that was used again. An instance serves all layers,
        so it must keep nothing.
        """
        shape = fit(quantizer, 20, 62)  # of no other check: only these weights can be cached
        earlier: list[torch.Tensor] = []
        limit = PRODUCT[torch.float32].value
        for seed in range(4):  # the packed weight before is deleted: its memory is used again
            found = pack(quantizer, gaussian(shape, 100 + seed))
            W = dense(quantizer, found)
            for transpose, x in both_ways(found, rows, seed=11):
                y = quantizer.matmul(x, found, transpose)
                stale = any(product_error(y, x, other, transpose) <= limit for other in earlier)
                # checks of products report a result that fits no weight
                assert not stale or product_error(y, x, W, transpose) <= limit, (
                    f"{transpose=}: expected the product with this weight, got the product with a "
                    "weight before it"
                )
            earlier.append(W)

    @needs(RANGES, *ALONE, LOOKUP)
    def test_reading_leaves_global_state_alone(self, quantizer):
        """If this fails: reading uses the global random state, changes a setting of torch or
        Python, prints, or leaves a file.

        A seed gives every layer the same dropout, and overrides the user's seed. Draw from a
        torch.Generator of your own. The number of threads and the gradient mode are the user's too.
        """
        found = packed(quantizer, (26, 64))  # of no other check: caches by shape are filled here
        with unchanged_globals("dequantize_tile"):
            tile(quantizer, found)
        for rows in ROWS:
            for transpose, x in both_ways(found, rows, seed=17):
                with unchanged_globals(f"matmul of {rows} rows, {transpose=}"):
                    quantizer.matmul(x, found, transpose)
        with unchanged_globals("lookup"):
            quantizer.lookup(torch.tensor([3, 1]), found, torch.float32)

    @needs(RANGES, *ALONE)
    @SETTINGS
    @given(data=st.data())
    def test_the_product_equals_the_dense_one(self, quantizer, measurements, data):
        """If this fails: `matmul(x, packed)` is not x Ŵᵀ for the Ŵ of `dequantize_tile`.

        The message names the number of rows, the shape and the dtype. In a rotated basis, rotate
        in float32, and a float64 x or tile in float64.
        """
        _check_product(quantizer, measurements, data, transpose=False)

    @needs(RANGES, *ALONE)
    @SETTINGS
    @given(data=st.data())
    def test_the_transposed_product_equals_the_dense_one(self, quantizer, measurements, data):
        """If this fails: `matmul(x, packed, transpose=True)` is not x Ŵ for the same Ŵ.

        Gradients go through it: training would follow another model than evaluation.
        """
        _check_product(quantizer, measurements, data, transpose=True)

    @needs(FORWARD, TRANSPOSED)
    def test_products_of_ragged_weights_equal_the_dense_ones(self, quantizer, measurements):
        """If this fails: a product omits or repeats the end of a weight that no block divides.

        One row or column more than a block, and one row of x more, are the usual cases.
        """
        limit = PRODUCT[torch.float32].value
        for size, side in itertools.product(RAGGED, ("rows", "columns")):
            shape = (size, 6) if side == "rows" else (6, size)
            found = pack(quantizer, gaussian(fit(quantizer, *shape), size))
            W = dense(quantizer, found)
            for rows in (1, 2, 33):
                for transpose, x in both_ways(found, rows, seed=18):
                    error = product_error(quantizer.matmul(x, found, transpose), x, W, transpose)
                    case = f"{list(found.shape)}, {rows} rows, {transpose=}"
                    measurements.at_most("product of a ragged weight", error, limit, case=case)

    @pytest.mark.threads
    @pytest.mark.parametrize("form", LARGE)
    @pytest.mark.parametrize("rows", [1, 3, 130], ids=lambda n: f"{n} rows")
    @needs(FORWARD, TRANSPOSED)
    def test_products_of_a_large_weight_equal_the_dense_ones(
        self, quantizer, measurements, rows, form
    ):
        """If this fails: as the checks before, for a weight of many blocks with a short last
        one."""
        found = packed(quantizer, LARGE[form])
        W = dense(quantizer, found)
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            for transpose, x in both_ways(found, rows, dtype=dtype, seed=5):
                y = quantizer.matmul(x, found, transpose)
                assert y.dtype == dtype, f"expected a product in {dtype}, got {y.dtype}"
                error = product_error(y, x, W, transpose)
                name, limit = f"product of a large weight in {dtype}", PRODUCT[dtype]
                case = f"{transpose=}; {limit.reason}"
                measurements.at_most(name, error, limit.value, case=case)

    @pytest.mark.parametrize("rows", [2, 48], ids=lambda n: f"{n} rows")
    @needs(FORWARD, TRANSPOSED)
    def test_the_two_directions_are_adjoint(self, quantizer, measurements, rows):
        """If this fails: ⟨x Ŵᵀ, y⟩ and ⟨x, y Ŵ⟩ differ by more than rounding.

        The two directions multiply by different weights. This check uses no tiles.
        """
        found = packed(quantizer, (137, 210))
        (_, x), (_, y) = both_ways(found, rows, dtype=torch.float64, seed=6)
        forward = quantizer.matmul(x, found).detach()
        backward = quantizer.matmul(y, found, True).detach()
        scale = x.norm() * backward.norm() + y.norm() * forward.norm()
        error = float(((forward * y).sum() - (x * backward).sum()).abs() / scale)
        measurements.at_most("difference of the directions", error, PRODUCT[torch.float64].value)

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("magnitude", [1e-6, 1e6], ids=str)
    @needs(FORWARD, TRANSPOSED)
    def test_tiny_and_large_inputs_keep_their_precision(
        self, quantizer, measurements, dtype, magnitude
    ):
        """If this fails: inside `matmul`, small inputs vanish or large inputs overflow.

        Activations reach 1e4, and gradients 1e-6 or, scaled, 1e6. Sum, scale and rotate in fp32.
        """
        found = packed(quantizer, (40, 128))
        W = dense(quantizer, found)
        # fp16 holds 65,504, and 1e-6 with few digits
        size = {1e-6: 1e-4, 1e6: 1e4}[magnitude] if dtype == torch.float16 else magnitude
        for transpose, x in both_ways(found, 4, dtype=torch.float64, seed=10):
            x = (x * size).clamp(-3 * size, 3 * size).to(dtype)
            error = product_error(quantizer.matmul(x, found, transpose), x, W, transpose)
            name, case = f"inputs of {magnitude:g}", f"{dtype}, {transpose=}"
            measurements.at_most(name, error, PRODUCT[dtype].value, case=case)

    @needs(FORWARD, TRANSPOSED)
    def test_a_misfit_input_is_refused(self, quantizer):
        """If this fails: an x with a wrong last dimension, or with none, is multiplied.

        Raise ShapeError, or call `super().matmul`, which raises it.
        """
        found = packed(quantizer, SHAPE)
        for transpose, x in both_ways(found, 2):
            for wrong in (pad(x, (0, 1)), x[:, 1:], torch.tensor(1.0)):
                with pytest.raises(ShapeError):
                    quantizer.matmul(wrong, found, transpose)


def _check_product(
    quantizer: Quantizer, measurements: Measurements, data: st.DataObject, *, transpose: bool
) -> None:
    dtype, shape = data.draw(st.sampled_from(DTYPES)), data.draw(shapes(quantizer))
    rows = data.draw(st.sampled_from([1, 2, 7, 16, 31, 33, 70]))
    seed = data.draw(seeds)
    found = pack(quantizer, gaussian(shape, seed))
    x = inputs((rows,), shape[0 if transpose else 1], dtype, seed + 1)
    y = quantizer.matmul(x, found, transpose)
    assert y.dtype == dtype, f"expected a product in {dtype}, got {y.dtype}"
    expected = (rows, shape[1 if transpose else 0])
    assert tuple(y.shape) == expected, f"expected shape {expected}, got {list(y.shape)}"
    error, limit = product_error(y, x, dense(quantizer, found), transpose), PRODUCT[dtype]
    case = f"{list(shape)}, {rows} rows; {limit.reason}"
    measurements.at_most(f"product in {dtype}", error, limit.value, case=case)
