"""L2, tiles: any rows, at any time, in any dtype, are the same rows, and cost no more than they are."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from modulora_conformance.bits import check_same_bytes, same_bits
from modulora_conformance.cases import (
    DTYPES,
    KINDS,
    SETTINGS,
    fit,
    gaussian,
    pack,
    packed,
    seeds,
    shapes,
)
from modulora_conformance.changes import clone
from modulora_conformance.checks import Level, needs
from modulora_conformance.measurements import Measurements
from modulora_conformance.tolerances import ROUNDING
from modulora_core.devices.memory import Allocations
from modulora_core.errors import ShapeError
from modulora_core.spec import PackedWeight, Quantizer
from modulora_core.tiles import tile_budget

TALL = (4096, 256)
"""A weight whose whole is much larger than 64 rows of it: 4 MiB in fp32, against 64 KiB."""

NARROW = (1100, 64)
"""Two blocks of 512 rows and a short one, as the rows of a head or an embedding are cut; narrow, so that packing it takes no time."""

SMALL_BUDGET = 256 * 2**10


class Tiles(Level):
    level, title = "L2", "tiles"

    def test_a_tile_leaves_the_packed_tensors_alone(self, quantizer: Quantizer) -> None:
        """If this fails: `dequantize_tile` writes to packed tensors. They are the checkpoint's, mapped from a file perhaps, and shared by
        threads and copies of a model. Work in memory of your own.
        """
        found = packed(quantizer, (22, 64))
        before = clone(found)
        for dtype in DTYPES:
            for rows in ((0, found.shape[0]), (3, 4)):
                quantizer.dequantize_tile(found, rows, dtype)
                check_same_bytes(
                    before, found, f"packed tensors after dequantize_tile of rows {rows} in {dtype}"
                )

    @SETTINGS
    @given(data=st.data())
    @needs("test_a_tile_leaves_the_packed_tensors_alone")
    def test_any_range_equals_the_rows_of_the_whole(
        self, quantizer: Quantizer, data: st.DataObject
    ) -> None:
        """If this fails: rows depend on the range that they are asked for in, as at the seam between two tiles, at an odd start, or
        in a last short block. Backward and forward may then see other weights. The bits must be the same.
        """
        shape, dtype = data.draw(shapes(quantizer)), data.draw(st.sampled_from(DTYPES))
        found = pack(
            quantizer, data.draw(st.sampled_from(sorted(KINDS.items())))[1](shape, data.draw(seeds))
        )
        start = data.draw(st.integers(0, shape[0] - 1))
        stop = data.draw(st.integers(start + 1, shape[0]))  # an empty range is another check's
        whole, part = (
            _tile(quantizer, found, (0, shape[0]), dtype),
            _tile(quantizer, found, (start, stop), dtype),
        )
        assert tuple(part.shape) == (stop - start, shape[1]), (
            f"expected shape {(stop - start, shape[1])}, got {tuple(part.shape)}"
        )
        assert same_bits(part, whole[start:stop]), (
            f"rows {start} to {stop} of a {list(shape)} weight in {dtype}: expected the bits of the whole's rows, got others"
        )

    @needs("test_any_range_equals_the_rows_of_the_whole")
    def test_every_block_of_rows_of_a_large_weight_equals_the_whole(
        self, quantizer: Quantizer
    ) -> None:
        """If this fails: as the check before, for a weight that kernels split among threads and into blocks, whose last is a short one."""
        found, tall = packed(quantizer, (300, 288)), packed(quantizer, NARROW)
        rows, last = found.shape[0], tall.shape[0]
        blocks = [
            (start, min(rows, start + step))
            for step in (1, 7, 64, 129)
            for start in range(0, rows, step * max(1, 24 // step))
        ]
        _check_blocks(quantizer, found, blocks)
        ends = [(start, last) for start in (last - 1, last - 7, last - 64, 1024, 1000, 512, 500)]
        _check_blocks(quantizer, tall, [*ends, (0, 512), (500, 1030)])

    @pytest.mark.parametrize(
        "rows", ["before the first", "after the last", "backwards", "far away"]
    )
    def test_rows_outside_are_refused(self, quantizer: Quantizer, rows: str) -> None:
        """If this fails: a range outside of the weight reads memory that isn't its own, or gives fewer rows than asked for. Call
        `check_rows(packed, rows)` first, which raises ShapeError.
        """
        found = packed(quantizer, (16, 64))
        n = found.shape[0]
        asked = {
            "before the first": (-1, 2),
            "after the last": (0, n + 1),
            "backwards": (3, 2),
            "far away": (n + 5, n + 9),
        }[rows]
        with pytest.raises(ShapeError):
            quantizer.dequantize_tile(found, asked, torch.float32)

    def test_an_empty_range_is_an_empty_tile(self, quantizer: Quantizer) -> None:
        """If this fails: rows [k, k) don't give a tile of no rows, `[0, in]`, in the dtype asked for. A reshape to -1 can't know its size
        where there is nothing: name it.
        """
        found = packed(quantizer, (16, 64))
        for dtype, row in itertools.product(DTYPES, (0, 5, found.shape[0])):
            tile = quantizer.dequantize_tile(found, (row, row), dtype)
            assert tuple(tile.shape) == (0, found.shape[1]), (
                f"rows [{row}, {row}): expected shape {(0, found.shape[1])}, got {tuple(tile.shape)}"
            )
            assert tile.dtype == dtype, f"rows [{row}, {row}): expected {dtype}, got {tile.dtype}"

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_every_dtype_is_the_float32_tile_rounded(
        self, quantizer: Quantizer, measurements: Measurements, dtype: torch.dtype
    ) -> None:
        """If this fails: a tile in another dtype holds other values than the float32 one, by more than a rounding: it was computed
        in 16 bits, or cast twice. Compute in fp32 and round once.
        """
        found = pack(quantizer, KINDS["heavy_tailed"](fit(quantizer, 48, 160), 3))
        rows = (0, found.shape[0])
        exact, tile = (
            quantizer.dequantize_tile(found, rows, torch.float32),
            quantizer.dequantize_tile(found, rows, dtype),
        )
        assert tile.dtype == dtype, f"expected a tile of {dtype}, got {tile.dtype}"
        error = float(
            (tile.double() - exact.double()).abs().nan_to_num(nan=torch.inf).max()
            / exact.abs().max()
        )
        measurements.at_most(
            f"tile in {dtype}", error, ROUNDING[dtype].value, case=ROUNDING[dtype].reason
        )

    @needs("test_any_range_equals_the_rows_of_the_whole")
    def test_a_tile_takes_the_memory_of_a_tile(
        self, quantizer: Quantizer, measurements: Measurements
    ) -> None:
        """If this fails: `dequantize_tile` makes the whole weight, or a large part of it, to give a few rows. That is the memory that
        ModuLoRA exists to save.
        """
        found = packed(quantizer, TALL)
        rows, columns = found.shape
        quantizer.dequantize_tile(found, (0, 1), torch.float32)  # what is made once stays
        # a basis in which a row needs all rows is worked through in strips: of the budget, and not of the weight
        with tile_budget(SMALL_BUDGET), Allocations(found.tensors.values()) as allocations:
            quantizer.dequantize_tile(found, (64, 128), torch.float32)
        # a quarter of the whole: eight times the rows asked for, with room for scratch of a fixed size
        measurements.at_most(
            "peak for 64 of 4096 rows", allocations.peak, rows * columns * 4 / 4, unit="bytes"
        )

    def test_packing_another_weight_leaves_this_one(self, quantizer: Quantizer) -> None:
        """If this fails: a packed weight is read with something of the weight that was packed last: an attribute of the instance, or a
        variable of the module. One instance packs and reads all layers of a model.
        """
        shape = fit(quantizer, 38, 70)
        first = pack(quantizer, gaussian(shape, 12))
        rows = (0, shape[0])
        before = quantizer.dequantize_tile(first, rows, torch.float32).clone()
        pack(quantizer, gaussian(shape, 13))
        assert torch.equal(quantizer.dequantize_tile(first, rows, torch.float32), before), (
            "expected the weight as it was, got another one: packing another weight changed this one: state in the instance or module; "
            "keep what belongs to a weight in its packed tensors"
        )

    @needs("test_packing_another_weight_leaves_this_one")
    def test_the_tile_is_the_callers(self, quantizer: Quantizer) -> None:
        """If this fails: a tile is a view of something that the plugin keeps, so that what a caller writes to it changes the weight,
        or the next tile overwrites this one; or the tile is of what was packed last.
        """
        found = packed(quantizer, (34, 66))
        another = pack(quantizer, gaussian(found.shape, 11))
        for rows in ((0, found.shape[0]), (3, 4), (5, 9)):
            where = f"rows {rows[0]} to {rows[1]} of {found.shape[0]}"
            first = quantizer.dequantize_tile(found, rows, torch.float32)
            before = first.clone()
            other = quantizer.dequantize_tile(another, rows, torch.float32)
            assert torch.equal(first, before), (
                f"{where}: expected the tile as it was, got it overwritten by a later one"
            )
            other.zero_()
            first.zero_()
            assert torch.equal(quantizer.dequantize_tile(found, rows, torch.float32), before), (
                f"{where}: expected the weight as it was, got another one after its tile was written to; copy what you keep"
            )


def _check_blocks(quantizer: Quantizer, found: PackedWeight, blocks: list[tuple[int, int]]) -> None:
    rows = found.shape[0]
    whole = _tile(quantizer, found, (0, rows), torch.float32)
    for start, stop in blocks:
        part = _tile(quantizer, found, (start, stop), torch.float32)
        assert same_bits(part, whole[start:stop]), (
            f"rows {start} to {stop} of {rows}: expected the bits of the whole's rows, got others"
        )


def _tile(
    quantizer: Quantizer, found: PackedWeight, rows: tuple[int, int], dtype: torch.dtype
) -> torch.Tensor:
    return quantizer.dequantize_tile(found, rows, dtype)
