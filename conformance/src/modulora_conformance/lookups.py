"""L2, tiles: rows looked up by their numbers, as an embedding does, are those of the tiles."""

from __future__ import annotations

from typing import ClassVar

import pytest
import torch
from torch import Tensor

from modulora_conformance.bits import same_bits
from modulora_conformance.cases import DTYPES, packed
from modulora_conformance.checks import Level, needs
from modulora_conformance.measurements import Measurements
from modulora_conformance.tiles import SMALL_BUDGET, TALL
from modulora_core.devices.memory import Allocations
from modulora_core.spec import Quantizer
from modulora_core.tiles import tile_budget

SHAPE = (16, 64)


class Lookups(Level):
    """A class that inherits :meth:`~modulora_core.spec.Quantizer.lookup` passes where its tiles are right."""

    level, title = "L2", "tiles"

    IDS: ClassVar[dict[str, Tensor]] = {
        "neighbours, repeated, in no order": torch.tensor([[3, 4, 5, 0], [4, 15, 3, 3]]),
        "a batch of no tokens": torch.empty(2, 0, dtype=torch.int64),
        "one number": torch.tensor(7),
        "int32": torch.tensor([5, 0, 1], dtype=torch.int32),
        "uint8, which torch's indexing takes for a mask": torch.tensor(
            [1, 0, 2], dtype=torch.uint8
        ),
        "strided": torch.arange(16).view(4, 4).t(),
    }

    @needs("test_any_range_equals_the_rows_of_the_whole", "test_an_empty_range_is_an_empty_tile")
    def test_rows_looked_up_are_those_of_the_tile(self, quantizer: Quantizer) -> None:
        """If this fails: `lookup` gives other values, another shape or another dtype than `dequantize_tile` has for these rows. An
        embedding and a head that share one packed table then disagree. The bits must be the same, `[*ids.shape, in]`.
        """
        found = packed(quantizer, SHAPE)
        for dtype in DTYPES:
            whole = quantizer.dequantize_tile(found, (0, found.shape[0]), dtype)
            for what, ids in self.IDS.items():
                rows, case = (
                    quantizer.lookup(ids, found, dtype),
                    f"ids {list(ids.shape)}, {what}, in {dtype}",
                )
                expected = whole[ids.long()]
                assert rows.shape == expected.shape, (
                    f"{case}: expected shape {list(expected.shape)}, got {list(rows.shape)}"
                )
                assert rows.dtype == dtype, f"{case}: got rows of {rows.dtype}"
                assert same_bits(rows.contiguous(), expected), (
                    f"{case}: not the bits of the tile's rows"
                )

    @pytest.mark.parametrize("wrong", ["before the first", "after the last"])
    def test_ids_outside_are_refused(self, quantizer: Quantizer, wrong: str) -> None:
        """If this fails: an id that is no row's gives some other row, as a negative one counted from the end, or ends the process on a
        GPU. Compare the smallest and the largest with the table first, and raise IndexError.
        """
        found = packed(quantizer, SHAPE)
        row = {"before the first": -1, "after the last": found.shape[0]}[wrong]
        with pytest.raises(IndexError):
            quantizer.lookup(torch.tensor([[3, row]]), found, torch.float32)

    @needs("test_rows_looked_up_are_those_of_the_tile", "test_the_tile_is_the_callers")
    def test_rows_looked_up_are_the_callers(self, quantizer: Quantizer) -> None:
        """If this fails: looked up rows carry a graph, though the table is frozen, or are a view of something that the plugin keeps, so
        that writing to them changes the weight.
        """
        found, ids = packed(quantizer, SHAPE), torch.arange(3, 9)
        rows = quantizer.lookup(ids, found, torch.float32)
        assert not rows.requires_grad, "the rows require a gradient: look up under torch.no_grad()"
        before = rows.clone()
        rows.zero_()
        assert torch.equal(quantizer.lookup(ids, found, torch.float32), before), (
            "writing to looked up rows changed the weight"
        )

    @needs("test_rows_looked_up_are_those_of_the_tile", "test_a_tile_takes_the_memory_of_a_tile")
    def test_a_lookup_takes_the_memory_of_its_rows(
        self, quantizer: Quantizer, measurements: Measurements
    ) -> None:
        """If this fails: `lookup` decodes the whole table, or a large part of it, to give a few rows. A vocabulary is often the largest
        matrix of a model.
        """
        found = packed(quantizer, TALL)
        rows, columns = found.shape
        ids = torch.tensor([5, rows // 2, rows - 1])
        quantizer.lookup(ids, found, torch.float32)  # what is made once stays
        with tile_budget(SMALL_BUDGET), Allocations(found.tensors.values()) as allocations:
            quantizer.lookup(ids, found, torch.float32)
        # as for a tile: a rotated basis works in strips of the budget
        measurements.at_most(
            "peak for looking up 3 of 4096 rows",
            allocations.peak,
            rows * columns * 4 / 4,
            unit="bytes",
        )
