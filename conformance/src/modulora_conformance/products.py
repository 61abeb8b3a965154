"""L3, products: both directions equal the dense products of the weight that the tiles show."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from modulora_conformance.bits import check_same_bytes
from modulora_conformance.cases import (
    DTYPES,
    SETTINGS,
    fit,
    gaussian,
    inputs,
    pack,
    packed,
    seeds,
    shapes,
)
from modulora_conformance.changes import clone
from modulora_conformance.checks import Level, needs
from modulora_conformance.measurements import Measurements
from modulora_conformance.oracle import dense, product_error
from modulora_conformance.random_state import unchanged_random_state
from modulora_conformance.tiles import NARROW
from modulora_conformance.tolerances import PRODUCT
from modulora_core.errors import ShapeError
from modulora_core.spec import Quantizer

TILES = "test_any_range_equals_the_rows_of_the_whole"
FORWARD = "test_the_product_equals_the_dense_one"
TRANSPOSED = "test_the_transposed_product_equals_the_dense_one"
ALONE = (
    "test_the_input_of_a_product_is_unchanged",
    "test_a_product_leaves_the_packed_tensors_alone",
    "test_the_product_is_the_callers",
    "test_a_product_is_not_that_of_an_earlier_weight",
)

LARGE = {"wide": (301, 1034), "tall": NARROW}
"""Larger than a thread's share, a block of columns, of rows, or a few rows; no power of two divides them well."""


class Products(Level):
    level, title = "L3", "products"

    @needs(TILES)
    def test_the_input_of_a_product_is_unchanged(self, quantizer: Quantizer) -> None:
        """If this fails: `matmul` works in the memory of x, which autograd saved for the gradient of A."""
        found = packed(quantizer, (24, 64))
        for transpose in (False, True):
            for rows in (1, 40):
                x = inputs((rows,), found.shape[0 if transpose else 1], torch.float32, 13)
                before = x.clone()
                quantizer.matmul(x, found, transpose).add_(1.0)
                assert torch.equal(x, before), f"x was changed ({rows} rows, transpose={transpose})"

    @needs(TILES)
    def test_a_product_leaves_the_packed_tensors_alone(self, quantizer: Quantizer) -> None:
        """If this fails: `matmul` or `lookup` writes to packed tensors. They are the checkpoint's, mapped from a file perhaps, and shared
        by threads and copies of a model. Work in memory of your own.
        """
        found = packed(quantizer, (22, 64))
        before = clone(found)
        for transpose, rows in itertools.product((False, True), (1, 40)):
            quantizer.matmul(
                inputs((rows,), found.shape[0 if transpose else 1], torch.float32, 16),
                found,
                transpose,
            )
            check_same_bytes(
                before, found, f"packed tensors after matmul of {rows} rows, transpose={transpose}"
            )
        quantizer.lookup(torch.tensor([3, 1]), found, torch.float32)
        check_same_bytes(before, found, "packed tensors after lookup")

    @needs(TILES)
    def test_the_product_is_the_callers(self, quantizer: Quantizer) -> None:
        """If this fails: `matmul` returns memory that it uses again: the next product overwrites the one before, which the layer adds
        its bias to and the graph may need.
        """
        found = packed(quantizer, (24, 64))
        for transpose in (False, True):
            for rows in (1, 40):
                x, other = (
                    inputs((rows,), found.shape[0 if transpose else 1], torch.float32, seed)
                    for seed in (14, 15)
                )
                first = quantizer.matmul(x, found, transpose)
                before = first.clone()
                quantizer.matmul(other, found, transpose)
                assert torch.equal(first, before), (
                    f"a later product overwrote this one ({rows} rows, transpose={transpose})"
                )

    @pytest.mark.parametrize("rows", [1, 40], ids=lambda n: f"{n} rows")
    @needs(TILES)
    def test_a_product_is_not_that_of_an_earlier_weight(
        self, quantizer: Quantizer, rows: int
    ) -> None:
        """If this fails: something of one weight is used for another of the same shape: a buffer or a cache that is keyed on shape, on
        an id, or on an address that was used again. An instance serves all layers, so it must keep nothing.
        """
        shape = fit(
            quantizer, 20, 62
        )  # of no other check: what is kept for it is of one of these weights
        earlier: list[torch.Tensor] = []
        for seed in range(4):  # the packed weight before is gone: its memory is used again
            found = pack(quantizer, gaussian(shape, 100 + seed))
            W = dense(quantizer, found)
            for transpose in (False, True):
                x = inputs((rows,), shape[0 if transpose else 1], torch.float32, 11)
                y = quantizer.matmul(x, found, transpose)
                limit, own = PRODUCT[torch.float32].value, product_error(y, x, W, transpose)
                others = [product_error(y, x, other, transpose) for other in earlier]
                # one that is none of theirs is wrong in another way, which the checks of products tell
                assert own <= limit or not any(other <= limit for other in others), (
                    f"transpose={transpose}: expected the product with this weight, got that with a weight before it"
                )
            earlier.append(W)

    @needs(TILES, *ALONE, "test_rows_looked_up_are_those_of_the_tile")
    def test_reading_leaves_random_numbers_alone(self, quantizer: Quantizer) -> None:
        """If this fails: `dequantize_tile`, `matmul` or `lookup` seeds or draws from the random numbers of the whole process: where it
        seeds them, every layer gets the same dropout, and a user's seed counts for nothing. Draw from a torch.Generator of your own.
        """
        found = packed(
            quantizer, (26, 64)
        )  # of no other check: what is made once for a shape is made here
        with unchanged_random_state("dequantize_tile"):
            quantizer.dequantize_tile(found, (0, found.shape[0]), torch.float32)
        for transpose, rows in itertools.product((False, True), (1, 40)):
            x = inputs((rows,), found.shape[0 if transpose else 1], torch.float32, 17)
            with unchanged_random_state(f"matmul of {rows} rows, transpose={transpose}"):
                quantizer.matmul(x, found, transpose)
        with unchanged_random_state("lookup"):
            quantizer.lookup(torch.tensor([3, 1]), found, torch.float32)

    @SETTINGS
    @given(data=st.data())
    @needs(TILES, *ALONE)
    def test_the_product_equals_the_dense_one(
        self, quantizer: Quantizer, measurements: Measurements, data: st.DataObject
    ) -> None:
        """If this fails: `matmul(x, packed)` isn't x Ŵᵀ for the Ŵ that `dequantize_tile` gives: for this number of rows, this odd
        shape, or this dtype.
        """
        _check_product(quantizer, measurements, data, transpose=False)

    @SETTINGS
    @given(data=st.data())
    @needs(TILES, *ALONE)
    def test_the_transposed_product_equals_the_dense_one(
        self, quantizer: Quantizer, measurements: Measurements, data: st.DataObject
    ) -> None:
        """If this fails: `matmul(x, packed, transpose=True)` isn't x Ŵ for the Ŵ that `dequantize_tile` gives. It is what gradients
        go through: training would follow another model than the one that it evaluates.
        """
        _check_product(quantizer, measurements, data, transpose=True)

    @pytest.mark.parametrize("form", LARGE)
    @pytest.mark.parametrize("rows", [1, 3, 40], ids=lambda n: f"{n} rows")
    @needs(FORWARD, TRANSPOSED)
    def test_products_of_a_large_weight_equal_the_dense_ones(
        self, quantizer: Quantizer, measurements: Measurements, rows: int, form: str
    ) -> None:
        """If this fails: as the checks before, for a weight that kernels split among threads and into blocks, whose last is a short one."""
        found = packed(quantizer, LARGE[form])
        W = dense(quantizer, found)
        for transpose in (False, True):
            x = inputs((rows,), found.shape[0 if transpose else 1], torch.float32, 5)
            error = product_error(quantizer.matmul(x, found, transpose), x, W, transpose)
            limit = PRODUCT[torch.float32]
            measurements.at_most(
                "product of a large weight",
                error,
                limit.value,
                case=f"transpose={transpose}; {limit.reason}",
            )

    @pytest.mark.parametrize("rows", [2, 48], ids=lambda n: f"{n} rows")
    @needs(FORWARD, TRANSPOSED)
    def test_the_two_directions_are_adjoint(
        self, quantizer: Quantizer, measurements: Measurements, rows: int
    ) -> None:
        """If this fails: ⟨x Ŵᵀ, y⟩ and ⟨x, y Ŵ⟩ differ by more than rounding: the two directions multiply by different weights. Tiles
        aren't asked here, so this holds whatever they say.
        """
        found = packed(quantizer, (137, 210))
        out_features, in_features = found.shape
        x, y = (
            inputs((rows,), in_features, torch.float64, 6),
            inputs((rows,), out_features, torch.float64, 7),
        )
        forward, backward = quantizer.matmul(x, found), quantizer.matmul(y, found, True)
        scale = x.norm() * backward.norm() + y.norm() * forward.norm()
        error = float(((forward * y).sum() - (x * backward).sum()).abs() / scale)
        measurements.at_most("difference of the directions", error, PRODUCT[torch.float64].value)

    @needs(FORWARD, TRANSPOSED)
    def test_leading_dimensions_are_kept(
        self, quantizer: Quantizer, measurements: Measurements
    ) -> None:
        """If this fails: `matmul` doesn't take `[features]`, `[batch, tokens, features]` or more, and give the same leading
        dimensions back in x's dtype.
        """
        found = packed(quantizer, (24, 64))
        W = dense(quantizer, found)
        for transpose in (False, True):
            given_, wanted = found.shape if transpose else found.shape[::-1]
            for leading in ((), (1,), (2, 3), (2, 1, 2, 2)):
                x = inputs(leading, given_, torch.float32, 8)
                y = quantizer.matmul(x, found, transpose)
                assert tuple(y.shape) == (*leading, wanted), (
                    f"x {list(x.shape)}: expected {[*leading, wanted]}, got {list(y.shape)}"
                )
                assert y.dtype == x.dtype, f"expected {x.dtype}, got {y.dtype}"
                measurements.at_most(
                    "product",
                    product_error(y, x, W, transpose),
                    PRODUCT[x.dtype].value,
                    case=leading,
                )

    @needs(FORWARD, TRANSPOSED, "test_leading_dimensions_are_kept")
    def test_zero_rows_give_zero_rows(self, quantizer: Quantizer) -> None:
        """If this fails: an input of no rows, as an expert that no token reached gets, isn't an output of no rows."""
        found = packed(quantizer, (24, 64))
        for transpose in (False, True):
            given_, wanted = found.shape if transpose else found.shape[::-1]
            for leading in ((0,), (2, 0), (0, 3)):
                for dtype in (torch.float32, torch.bfloat16):
                    y = quantizer.matmul(
                        torch.empty(*leading, given_, dtype=dtype), found, transpose
                    )
                    assert tuple(y.shape) == (*leading, wanted), (
                        f"expected {[*leading, wanted]}, got {list(y.shape)}"
                    )
                    assert y.dtype == dtype, f"expected {dtype}, got {y.dtype}"

    @needs(FORWARD, TRANSPOSED, "test_leading_dimensions_are_kept")
    def test_strides_of_the_input_do_not_matter(
        self, quantizer: Quantizer, measurements: Measurements
    ) -> None:
        """If this fails: an input that isn't contiguous is read in another order."""
        found = packed(quantizer, (24, 64))
        W = dense(quantizer, found)
        for transpose in (False, True):
            features = found.shape[0 if transpose else 1]
            x = inputs((6, 5), features, torch.float32, 9)
            wide = torch.full((6, 5, 2 * features), torch.nan)
            wide[..., ::2] = x
            for strided in (
                x.transpose(0, 1),
                wide[..., ::2],
                x[::2],
                x.permute(2, 0, 1).contiguous().permute(1, 2, 0),
            ):
                error = product_error(
                    quantizer.matmul(strided, found, transpose), strided, W, transpose
                )
                measurements.at_most(
                    "product", error, PRODUCT[x.dtype].value, case=strided.stride()
                )

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("magnitude", [1e-6, 1e4], ids=str)
    @needs(FORWARD, TRANSPOSED)
    def test_tiny_and_large_inputs_keep_their_precision(
        self, quantizer: Quantizer, measurements: Measurements, dtype: torch.dtype, magnitude: float
    ) -> None:
        """If this fails: small inputs vanish or large ones overflow inside of `matmul`: activations reach 1e4, and gradients 1e-6.
        Sum, scale and rotate in fp32.
        """
        found = packed(quantizer, (40, 128))
        W = dense(quantizer, found)
        # in fp16 an input of 1e-6 is subnormal: the oracle gets the input as it is rounded
        tiny = dtype == torch.float16 and magnitude < 1
        for transpose in (False, True):
            x = (
                inputs((4,), found.shape[0 if transpose else 1], torch.float64, 10)
                * (1e-4 if tiny else magnitude)
            ).to(dtype)
            x = x.clamp(-3e4, 3e4)
            y = quantizer.matmul(x, found, transpose)
            error = product_error(y, x, W, transpose)
            measurements.at_most(
                f"inputs of {magnitude:g}",
                error,
                PRODUCT[dtype].value,
                case=f"{dtype}, transpose={transpose}",
            )

    @needs(FORWARD, TRANSPOSED)
    def test_a_misfit_input_is_refused(self, quantizer: Quantizer) -> None:
        """If this fails: an x whose last dimension isn't the weight's is multiplied all the same. Raise ShapeError, or leave such an
        input to `super().matmul`, which does.
        """
        found = packed(quantizer, (24, 64))
        for transpose in (False, True):
            features = found.shape[0 if transpose else 1]
            for wrong in (
                torch.randn(2, features + 1),
                torch.randn(2, features - 1),
                torch.tensor(1.0),
            ):
                with pytest.raises(ShapeError):
                    quantizer.matmul(wrong, found, transpose)


def _check_product(
    quantizer: Quantizer, measurements: Measurements, data: st.DataObject, *, transpose: bool
) -> None:
    dtype = data.draw(st.sampled_from(DTYPES))
    shape = data.draw(shapes(quantizer))
    rows = data.draw(st.sampled_from([1, 2, 7, 16, 31, 33, 70]))
    seed = data.draw(seeds)
    found = pack(quantizer, gaussian(shape, seed))
    x = inputs((rows,), shape[0 if transpose else 1], dtype, seed + 1)
    y = quantizer.matmul(x, found, transpose)
    assert y.dtype == dtype, f"expected a product in {dtype}, got {y.dtype}"
    assert tuple(y.shape) == (rows, shape[1 if transpose else 0]), (
        f"got shape {list(y.shape)} for x {list(x.shape)}"
    )
    limit = PRODUCT[dtype]
    error = product_error(y, x, dense(quantizer, found), transpose)
    measurements.at_most(
        f"product in {dtype}",
        error,
        limit.value,
        case=f"{list(shape)}, {rows} rows; {limit.reason}",
    )
