"""L3: x and packed tensors in any form: views, slices, any dimensions, NaN and Inf."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from modulora_conformance.cases import DTYPES, both_ways, fit, gaussian, pack, packed, tile
from modulora_conformance.changes import same_bits
from modulora_conformance.checks import Level, needs
from modulora_conformance.levels.lookups import LOOKUP
from modulora_conformance.levels.products import FORWARD, LEADING, TRANSPOSED
from modulora_conformance.oracle import dense, product_error
from modulora_conformance.tolerances import PRODUCT
from modulora_core.spec import PackedWeight

SHAPE = (41, 136)

EVEN = (64, 192)
"""A multiple of 32. With AMX, oneDNN pads bf16 features with the next row's, times 0: a NaN
spreads."""

LEADINGS = (
    (), (1,), (1, 1), (2, 3), (3, 1, 5), (2, 3, 4), (2, 1, 2, 2), (2, 2, 3, 2), (5, 1, 2, 1, 2),
    (1, 40), (40, 1),
)  # fmt: skip
"""The dimensions of x before its features: none to five."""

EMPTY = ((0,), (0, 1), (2, 0), (0, 3, 2), (2, 0, 2, 2))

EXPERTS = 4
"""Packed weights in one buffer."""


class Forms(Level):
    """Views and slices are multiplied and read as copies are."""

    level, title = "L3", "products"

    @needs(FORWARD, TRANSPOSED)
    def test_leading_dimensions_are_kept(self, quantizer, measurements):
        """If this fails: `matmul` refuses or changes leading dimensions, or x's dtype.

        It takes `[features]`, `[batch, tokens, features]` and more. Rows are all dimensions but the
        last: `x.reshape(-1, features)`, and back at the end. The result is contiguous: models call
        `.view`, and `torch.compile` relies on it.
        """
        found = packed(quantizer, SHAPE)
        W = dense(quantizer, found)
        for leading in LEADINGS:
            for transpose, x in both_ways(found, *leading, seed=62):
                y = quantizer.matmul(x, found, transpose)
                expected = (*leading, W.shape[1 if transpose else 0])
                case = f"x {list(x.shape)}"
                got = tuple(y.shape)
                assert got == expected, f"{case}: expected {expected}, got {list(got)}"
                assert y.dtype == x.dtype, f"{case}: expected {x.dtype}, got {y.dtype}"
                assert y.is_contiguous(), (
                    f"{case}: expected a contiguous result, got strides {y.stride()}"
                )
                error, limit = product_error(y, x, W, transpose), PRODUCT[x.dtype].value
                measurements.at_most("product", error, limit, case=list(x.shape))

    @needs(FORWARD, TRANSPOSED, LEADING)
    def test_zero_rows_give_zero_rows(self, quantizer):
        """If this fails: an x without rows, as of an idle expert, gives an error or rows."""
        found = packed(quantizer, SHAPE)
        for leading in EMPTY:
            for dtype in DTYPES:
                for transpose, x in both_ways(found, *leading, dtype=dtype):
                    y = quantizer.matmul(x, found, transpose)
                    expected = ((*leading, found.shape[1 if transpose else 0]), dtype)
                    got = (tuple(y.shape), y.dtype)
                    assert got == expected, f"x {list(x.shape)}: expected {expected}, got {got}"

    @needs(FORWARD, TRANSPOSED, LEADING)
    def test_strides_of_the_input_do_not_matter(self, quantizer, measurements):
        """If this fails: an x that is not contiguous is read in memory order.

        Or a view is read as if it began at its storage's start. Call `x.contiguous()` before a
        kernel.
        """
        found = packed(quantizer, SHAPE)
        W = dense(quantizer, found)
        for rows in (1, 2, 17, 70):
            for transpose, x in both_ways(found, rows, seed=61):
                for form, view in _views(x):
                    error = product_error(quantizer.matmul(view, found, transpose), x, W, transpose)
                    case, limit = f"{form}, {rows} rows, {transpose=}", PRODUCT[x.dtype].value
                    measurements.at_most("product of a view", error, limit, case=case)
        for leading in (leading for leading in LEADINGS if len(leading) > 1):
            for transpose, x in both_ways(found, *leading, seed=62):
                y, view = quantizer.matmul(x.transpose(0, 1), found, transpose), x.transpose(0, 1)
                error, limit = product_error(y, view, W, transpose), PRODUCT[x.dtype].value
                measurements.at_most("product of a view", error, limit, case=list(view.shape))
        for transpose, x in both_ways(found, 6, 5, seed=9):
            turned = x.permute(2, 0, 1).contiguous().permute(1, 2, 0)
            for view in (x.transpose(0, 1), x[::2], turned, x[:1].expand_as(x)):
                error = product_error(quantizer.matmul(view, found, transpose), view, W, transpose)
                limit = PRODUCT[x.dtype].value
                measurements.at_most("product of a view", error, limit, case=view.stride())

    @needs(FORWARD, TRANSPOSED, LOOKUP)
    def test_packed_tensors_may_be_slices(self, quantizer, measurements):
        """If this fails: packed tensors that are slices of a larger buffer are read elsewhere.

        A stack of experts is one buffer. A kernel takes the address of the storage, and not of the
        tensor, or a cache takes the storage for its key.
        """
        weights = [packed(quantizer, SHAPE, seed) for seed in range(EXPERTS)]
        for i, found in enumerate(_sliced(weights)):
            W, ids = dense(quantizer, weights[i]), torch.tensor([[3, 0], [7, 3]])
            case = f"slice {i} of {EXPERTS}"
            whole = tile(quantizer, weights[i])
            assert same_bits(tile(quantizer, found), whole), f"{case}: expected the same Ŵ"
            rows = quantizer.lookup(ids, found, torch.float32)
            assert same_bits(rows, whole[ids]), f"{case}: expected the same rows by lookup"
            for n in (1, 3, 40):
                for transpose, x in both_ways(found, n, seed=63):
                    error = product_error(quantizer.matmul(x, found, transpose), x, W, transpose)
                    limit = PRODUCT[x.dtype].value
                    measurements.at_most("product with a slice", error, limit, case=case)

    @pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf], ids=str)
    @needs(FORWARD, TRANSPOSED)
    def test_nan_and_inf_in_x_come_out(self, quantizer, measurements, bad):
        """If this fails: a NaN or Inf in x disappears in `matmul`, or reaches other rows.

        A gradient scaler and a user find a diverged run by it. Do not clamp x, and do not skip
        terms.
        """
        found = packed(quantizer, EVEN)
        W = dense(quantizer, found)
        for rows in (1, 2, 40):
            for transpose, x in both_ways(found, rows, seed=64):
                for dtype in (torch.float32, torch.bfloat16):
                    row, column = rows // 2, x.shape[-1] // 3
                    given = x.to(dtype)
                    given[row, column] = bad
                    y = quantizer.matmul(given, found, transpose)
                    case = f"{bad} in row {row} of {rows}, {dtype}, {transpose=}"
                    terms = (W.T if transpose else W)[:, column] != 0
                    lost = int(y[row][terms].isfinite().sum())
                    assert lost == 0, f"{case}: expected NaN or Inf, got {lost} finite outputs"
                    others = [i for i in range(rows) if i != row]
                    error = product_error(y[others], given[others], W, transpose)
                    limit = PRODUCT[dtype].value
                    measurements.at_most("product of the other rows", error, limit, case=case)

    @needs(FORWARD, TRANSPOSED, "test_tiny_and_large_inputs_keep_their_precision")
    def test_products_beyond_float16_are_inf(self, quantizer):
        """If this fails: a product that fp16 can't hold is a finite number.

        A gradient scaler looks for Inf, and lowers its scale. Convert a sum once, and do not clamp
        it.
        """
        found = pack(quantizer, 10 * gaussian(fit(quantizer, *EVEN), 65))
        W, largest = dense(quantizer, found), torch.finfo(torch.float16).max
        for rows in (1, 2, 40):
            for transpose, x in both_ways(found, rows, dtype=torch.float16, seed=65):
                M = W.T if transpose else W
                given = x.clone()
                given[rows // 2] = (largest * M[3].sign()).half()  # the largest sum of all
                y, exact = quantizer.matmul(given, found, transpose), given.double() @ M.T
                over = exact.abs() > 1.1 * largest
                assert bool(over.any()), f"{rows} rows: the kit's weight is too small"
                wrong = y[over] != exact[over].sign() * torch.inf
                assert not bool(wrong.any()), (
                    f"{rows} rows, {transpose=}: expected Inf where the sum is beyond "
                    f"{largest:,.0f}, got {float(y[over][wrong][0]):,.0f}"
                )


def _views(x: Tensor) -> Iterator[tuple[str, Tensor]]:
    """The matrix ``x`` as views of other memory, whose other elements are NaN."""
    rows, columns = x.shape
    yield "transposed", x.T.contiguous().T
    for offset in (1, 3, 64):
        buffer = torch.full((x.numel() + offset + 5,), torch.nan)
        view = buffer[offset : offset + x.numel()].view(rows, columns)
        view.copy_(x)
        yield f"{offset} elements after its storage's start", view
    wide = torch.full((rows + 2, columns + 7), torch.nan)
    wide[1:-1, 3 : columns + 3] = x
    yield "a part of a wider matrix", wide[1:-1, 3 : columns + 3]
    every = torch.full((3 * rows, 2 * columns), torch.nan)
    every[::3, ::2] = x
    yield "every third row and second column", every[::3, ::2]
    stack = torch.full((3, rows, columns), torch.nan)
    stack[1] = x
    yield "one matrix of a stack", stack[1]
    if rows == 1:
        yield "one row, expanded", x[0].expand(1, columns)


def _sliced(weights: list[PackedWeight]) -> list[PackedWeight]:
    """The packed weights on slices of one buffer for each tensor."""
    stacks = {
        name: torch.empty(len(weights), *tensor.shape, dtype=tensor.dtype)
        for name, tensor in weights[0].tensors.items()
    }
    for i, weight in enumerate(weights):
        for name, tensor in weight.tensors.items():
            stacks[name][i].copy_(tensor)
    return [
        weight.layout.fill({name: stack[i] for name, stack in stacks.items()})
        for i, weight in enumerate(weights)
    ]
