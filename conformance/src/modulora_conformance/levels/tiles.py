"""L2: any rows of Ŵ, by range or by number, have the same bits and take little memory."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from modulora_conformance.allocations import Allocations
from modulora_conformance.cases import (
    DTYPES,
    KINDS,
    SETTINGS,
    fit,
    gaussian,
    pack,
    packed,
    tile,
    weights,
)
from modulora_conformance.changes import check_same_bytes, clone, same_bits
from modulora_conformance.checks import Level, needs
from modulora_conformance.oracle import tile_error
from modulora_conformance.tolerances import ROUNDING
from modulora_core.errors import ShapeError
from modulora_core.spec import PackedWeight, Quantizer
from modulora_core.tiles import tile_budget

RANGES = "test_any_range_equals_the_rows_of_the_whole"
OWNED = "test_the_tile_is_the_callers"
LITTLE = "test_a_tile_takes_the_memory_of_a_tile"

TALL = (4096, 256)
"""A weight much larger than 64 of its rows: 4 MiB in fp32, and 64 KiB."""

NARROW = (1101, 64)
"""Two blocks of 512 rows and a short one, as a head is cut. It packs fast."""

SMALL = (16, 64)

BUDGET = 256 * 2**10
"""Bytes of a tile. A rotated basis, where a row needs all rows, works in strips of this size."""

QUARTER = 4096 * 256 * 4 / 4
"""Bytes of a quarter of :data:`TALL`: 16 times 64 rows, with room for fixed scratch."""


class Tiles(Level):
    """Any rows of Ŵ, at any time, in any dtype, are the same. They take only the memory of a
    tile."""

    level, title = "L2", "tiles"

    def test_a_tile_leaves_the_packed_tensors_alone(self, quantizer):
        """If this fails: `dequantize_tile` writes to packed tensors.

        Threads and copies of a model share them, and a file may back them. Work in your own memory.
        """
        found = packed(quantizer, (22, 64))
        before = clone(found)
        for dtype in DTYPES:
            for start, stop in ((0, found.shape[0]), (3, 4)):
                tile(quantizer, found, dtype, start, stop)
                origin = f"packed tensors after dequantize_tile of {start}:{stop} in {dtype}"
                check_same_bytes(before, found, origin)

    @needs("test_a_tile_leaves_the_packed_tensors_alone")
    @SETTINGS
    @given(data=st.data())
    def test_any_range_equals_the_rows_of_the_whole(self, quantizer, data):
        """If this fails: rows depend on the range, as at an odd start or in a short last block.

        Forward and backward may then use different weights. The bits must be the same. A matrix
        product rounds by its number of rows: rotate by additions instead.
        """
        found = pack(quantizer, data.draw(weights(quantizer)))
        dtype, rows = data.draw(st.sampled_from(DTYPES)), found.shape[0]
        start = data.draw(st.integers(0, rows - 1))
        stop = data.draw(st.integers(start + 1, rows))  # another check has empty ranges
        _check_rows(quantizer, found, dtype, (start, stop))

    @pytest.mark.threads
    @needs(RANGES)
    def test_every_block_of_rows_of_a_large_weight_equals_the_whole(self, quantizer):
        """If this fails: as the check before, for a weight of many blocks with a short last one."""
        found = packed(quantizer, (300, 288))
        rows = found.shape[0]
        for step in (1, 7, 64, 129):
            starts = range(0, rows, step * max(1, 24 // step))
            blocks = [(start, min(rows, start + step)) for start in starts]
            _check_rows(quantizer, found, torch.float32, *blocks)
        found = packed(quantizer, NARROW)
        rows = found.shape[0]
        ends = [(s, rows) for s in (rows - 1, rows - 7, rows - 64, 1024, 1000, 512, 500)]
        _check_rows(quantizer, found, torch.float32, *ends, (0, 512), (500, 1030))

    @needs(RANGES)
    def test_rows_of_a_ragged_weight_equal_the_whole(self, quantizer):
        """If this fails: as the check before, for a few rows of a width that blocks do not divide.

        The first code of a row is then inside of a byte, a word or a block of the row before.
        """
        for columns in (1, 31, 33, 65, 99, 257):
            found = pack(quantizer, gaussian(fit(quantizer, 9, columns), columns))
            rows = found.shape[0]
            starts = range(min(rows, 9))
            ranges = [(start, stop) for start in starts for stop in (start + 1, rows)]
            _check_rows(quantizer, found, torch.float32, *ranges)

    @pytest.mark.parametrize(
        "where", ["before the first", "after the last", "backwards", "far away"]
    )
    def test_rows_outside_are_refused(self, quantizer, where):
        """If this fails: a range outside of the weight causes an out-of-bounds read, or is cut.

        Call `check_rows(packed, rows)` first. It raises ShapeError.
        """
        found = packed(quantizer, SMALL)
        n = found.shape[0]
        ranges = {"before the first": (-1, 2), "after the last": (0, n + 1), "backwards": (3, 2)}
        with pytest.raises(ShapeError):
            tile(quantizer, found, torch.float32, *ranges.get(where, (n + 5, n + 9)))

    def test_an_empty_range_is_an_empty_tile(self, quantizer):
        """If this fails: rows [k, k) do not give an empty tile, `[0, in]`, in the dtype asked for.

        A reshape to -1 cannot infer a size without elements. Name the size.
        """
        found = packed(quantizer, SMALL)
        for dtype in DTYPES:
            for row in (0, 5, found.shape[0]):
                check_form(
                    tile(quantizer, found, dtype, row, row),
                    (0, found.shape[1]),
                    dtype,
                    f"rows [{row}, {row})",
                )

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_every_dtype_is_the_float32_tile_rounded(self, quantizer, measurements, dtype):
        """If this fails: a tile in another dtype differs by more than one rounding.

        It was computed in 16 bits, or cast twice. Compute in fp32 and round once.
        """
        found = pack(quantizer, KINDS["heavy_tailed"](fit(quantizer, 48, 160), 3))
        exact, rounded = tile(quantizer, found), tile(quantizer, found, dtype)
        assert rounded.dtype == dtype, f"expected a tile of {dtype}, got {rounded.dtype}"
        limit = ROUNDING[dtype]
        error = tile_error(rounded, exact)
        measurements.at_most(f"tile in {dtype}", error, limit.value, case=limit.reason)

    @needs(RANGES)
    def test_a_tile_takes_the_memory_of_a_tile(self, quantizer, measurements):
        """If this fails: `dequantize_tile` decodes the whole weight, or much of it, for a few
        rows."""
        found = packed(quantizer, TALL)
        tile(quantizer, found, torch.float32, 0, 1)  # whatever is made once exists now
        with tile_budget(BUDGET), Allocations(found.tensors.values()) as allocations:
            tile(quantizer, found, torch.float32, 64, 128)
        name = "peak for 64 of 4096 rows"
        measurements.at_most(name, allocations.peak, QUARTER, unit="bytes")

    def test_packing_another_weight_leaves_this_one(self, quantizer):
        """If this fails: reading uses something of the weight that was packed last.

        One instance packs and reads all layers of a model. Keep no state in it or in the module.
        """
        first = pack(quantizer, gaussian(fit(quantizer, 38, 70), 12))
        before = tile(quantizer, first).clone()
        pack(quantizer, gaussian(first.shape, 13))
        assert torch.equal(tile(quantizer, first), before), (
            "expected the weight unchanged after packing another one, got another Ŵ: state in the "
            "instance or module; store it in the packed tensors"
        )

    @needs("test_packing_another_weight_leaves_this_one")
    def test_the_tile_is_the_callers(self, quantizer):
        """If this fails: a tile is a view of memory that the plugin keeps.

        A caller that writes to it changes the weight, or the next tile overwrites it.
        """
        found = packed(quantizer, (34, 66))
        another = pack(quantizer, gaussian(found.shape, 11))
        for rows in ((0, found.shape[0]), (3, 4), (5, 9)):
            first = tile(quantizer, found, torch.float32, *rows)
            before = first.clone()
            other = tile(quantizer, another, torch.float32, *rows)
            assert torch.equal(first, before), (
                f"rows {rows}: expected the tile unchanged, got it overwritten by a later one"
            )
            other.zero_()
            first.zero_()
            assert torch.equal(tile(quantizer, found, torch.float32, *rows), before), (
                f"rows {rows}: expected the weight unchanged after a write to its tile, got "
                "another one; copy the memory that you keep"
            )


def check_form(found: Tensor, shape: tuple[int, ...], dtype: torch.dtype, case: str) -> None:
    assert tuple(found.shape) == shape, f"{case}: expected shape {shape}, got {tuple(found.shape)}"
    assert found.dtype == dtype, f"{case}: expected {dtype}, got {found.dtype}"


def _check_rows(
    quantizer: Quantizer, found: PackedWeight, dtype: torch.dtype, *ranges: tuple[int, int]
) -> None:
    """Each range has the bits of the same rows of the whole."""
    whole = tile(quantizer, found, dtype)
    for start, stop in ranges:
        part = tile(quantizer, found, dtype, start, stop)
        case = f"rows {start} to {stop} of a {list(found.shape)} weight in {dtype}"
        check_form(part, (stop - start, found.shape[1]), dtype, case)
        assert same_bits(part, whole[start:stop]), f"{case}: expected the bits of the whole"
