"""L2, tiles: any rows, at any time, in any dtype, are the same rows, and cost no more than they are."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from modulora_conformance.bits import same_bits
from modulora_conformance.cases import DTYPES, KINDS, SETTINGS, fit, gaussian, pack, packed, seeds, shapes
from modulora_conformance.checks import Level, needs
from modulora_conformance.measurements import Measurements
from modulora_conformance.tolerances import ROUNDING
from modulora_core.errors import ShapeError
from modulora_core.memory import Allocations
from modulora_core.spec import PackedWeight, Quantizer
from modulora_core.tiles import tile_budget

TALL = (4096, 256)
"""A weight whose whole is much larger than 64 rows of it: 4 MiB in fp32, against 64 KiB."""


SMALL_BUDGET = 256 * 2**10


class Tiles(Level):
    level, title = "L2", "tiles"

    @SETTINGS
    @given(data=st.data())
    def test_any_range_equals_the_rows_of_the_whole(self, quantizer: Quantizer, data: st.DataObject) -> None:
        """If this fails: rows depend on the range that they are asked for in, as at the seam between two tiles, at an odd start, or
        in a last short block. Backward and forward may then see other weights. The bits must be the same.
        """
        shape, dtype = data.draw(shapes(quantizer)), data.draw(st.sampled_from(DTYPES))
        found = pack(quantizer, data.draw(st.sampled_from(sorted(KINDS.items())))[1](shape, data.draw(seeds)))
        start = data.draw(st.integers(0, shape[0]))
        stop = data.draw(st.integers(start, shape[0]))
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
    def test_every_block_of_rows_of_a_large_weight_equals_the_whole(self, quantizer: Quantizer) -> None:
        """If this fails: as the check before, for a weight that kernels split among threads and into blocks."""
        found = packed(quantizer, (300, 288))
        rows = found.shape[0]
        whole = _tile(quantizer, found, (0, rows), torch.float32)
        for step in (1, 7, 64, 129):
            for start in range(0, rows, step * max(1, 24 // step)):
                stop = min(rows, start + step)
                part = _tile(quantizer, found, (start, stop), torch.float32)
                assert same_bits(part, whole[start:stop]), (
                    f"rows {start} to {stop} of {rows}: not the bits of the whole's"
                )

    @pytest.mark.parametrize("rows", ["before the first", "after the last", "backwards", "far away"])
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

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_an_empty_range_is_an_empty_tile(self, quantizer: Quantizer, dtype: torch.dtype) -> None:
        """If this fails: rows [k, k) don't give a tile of no rows, `[0, in]`, in the dtype asked for."""
        found = packed(quantizer, (16, 64))
        for row in (0, 5, found.shape[0]):
            tile = quantizer.dequantize_tile(found, (row, row), dtype)
            assert tuple(tile.shape) == (0, found.shape[1]), (
                f"rows [{row}, {row}): got shape {tuple(tile.shape)}"
            )
            assert tile.dtype == dtype, f"expected {dtype}, got {tile.dtype}"

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
            (tile.double() - exact.double()).abs().nan_to_num(nan=torch.inf).max() / exact.abs().max()
        )
        measurements.at_most(f"tile in {dtype}", error, ROUNDING[dtype].value, case=ROUNDING[dtype].reason)

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

    def test_the_tile_is_the_callers(self, quantizer: Quantizer) -> None:
        """If this fails: a tile is a view of something that the plugin keeps, so that what a caller writes to it changes the weight,
        or the next tile overwrites this one.
        """
        found = packed(quantizer, (32, 64))
        rows = (0, found.shape[0])
        first = quantizer.dequantize_tile(found, rows, torch.float32)
        before = first.clone()
        other = quantizer.dequantize_tile(pack(quantizer, gaussian(found.shape, 11)), rows, torch.float32)
        assert torch.equal(first, before), "a later tile overwrote this one"
        other.zero_()
        first.zero_()
        assert torch.equal(quantizer.dequantize_tile(found, rows, torch.float32), before), (
            "writing to a tile changed the weight"
        )


def _tile(
    quantizer: Quantizer, found: PackedWeight, rows: tuple[int, int], dtype: torch.dtype
) -> torch.Tensor:
    return quantizer.dequantize_tile(found, rows, dtype)
