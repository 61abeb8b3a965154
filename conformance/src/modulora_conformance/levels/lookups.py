"""L2: rows looked up by number, rows joined while they are packed, and channel scales."""

from __future__ import annotations

from typing import ClassVar

import pytest
import torch
from torch import Tensor

from modulora_conformance.allocations import Allocations
from modulora_conformance.cases import DTYPES, generator, packed, tile
from modulora_conformance.changes import check_same_bytes, clone, same_bits
from modulora_conformance.checks import Level, needs
from modulora_conformance.levels.tiles import (
    BUDGET,
    LITTLE,
    OWNED,
    QUARTER,
    RANGES,
    SMALL,
    TALL,
    check_form,
)
from modulora_conformance.oracle import relative_error
from modulora_conformance.results import NOT_OFFERED
from modulora_conformance.tolerances import ROUNDING
from modulora_core.errors import PluginError
from modulora_core.tiles import tile_budget

LOOKUP = "test_rows_looked_up_are_those_of_the_tile"


class Lookups(Level):
    """Rows looked up by number, as in an embedding, equal the tile's. An inherited `lookup`
    passes."""

    level, title = "L2", "tiles"

    IDS: ClassVar[dict[str, Tensor]] = {
        "neighbours, repeated, unordered": torch.tensor([[3, 4, 5, 0], [4, 15, 3, 3]]),
        "a batch of no tokens": torch.empty(2, 0, dtype=torch.int64),
        "one number": torch.tensor(7),
        "int32": torch.tensor([5, 0, 1], dtype=torch.int32),
        "uint8, which torch's indexing takes for a mask": torch.tensor([1, 0, 2]).byte(),
        "strided": torch.arange(16).view(4, 4).t(),
    }

    @needs(RANGES, "test_an_empty_range_is_an_empty_tile")
    def test_rows_looked_up_are_those_of_the_tile(self, quantizer):
        """If this fails: `lookup` gives other values, shapes or dtypes than `dequantize_tile`.

        An embedding and a head that share a packed table then disagree. The bits must be the same,
        `[*ids.shape, in]`.
        """
        found = packed(quantizer, SMALL)
        for dtype in DTYPES:
            whole = tile(quantizer, found, dtype)
            for form, ids in self.IDS.items():
                rows, case = quantizer.lookup(ids, found, dtype), f"ids, {form}, in {dtype}"
                check_form(rows, (*ids.shape, found.shape[1]), dtype, case)
                assert same_bits(rows, whole[ids.long()]), f"{case}: not the bits of the tile"

    @pytest.mark.parametrize("where", ["before the first", "after the last"])
    def test_ids_outside_are_refused(self, quantizer, where):
        """If this fails: an id without a row gives another row, or ends the process on a GPU.

        Compare the smallest and the largest id with the table first, and raise IndexError.
        """
        found = packed(quantizer, SMALL)
        row = -1 if where == "before the first" else found.shape[0]
        with pytest.raises(IndexError):
            quantizer.lookup(torch.tensor([[3, row]]), found, torch.float32)

    @needs(LOOKUP, OWNED)
    def test_rows_looked_up_are_the_callers(self, quantizer):
        """If this fails: looked up rows have a graph, though the table is frozen.

        Or they are a view of memory that the plugin keeps.
        """
        found, ids = packed(quantizer, SMALL), torch.arange(3, 9)
        rows = quantizer.lookup(ids, found, torch.float32)
        assert not rows.requires_grad, "rows: expected requires_grad False; use torch.no_grad()"
        before = rows.clone()
        rows.zero_()
        assert torch.equal(quantizer.lookup(ids, found, torch.float32), before), (
            "expected the table unchanged after a write to looked up rows, got another one"
        )

    @needs(LOOKUP, LITTLE)
    def test_a_lookup_takes_the_memory_of_its_rows(self, quantizer, measurements):
        """If this fails: `lookup` decodes the whole table, or much of it, for a few rows.

        A vocabulary is often the largest matrix of a model.
        """
        found = packed(quantizer, TALL)
        ids = torch.tensor([5, found.shape[0] // 2, found.shape[0] - 1])
        quantizer.lookup(ids, found, torch.float32)  # whatever is made once exists now
        with tile_budget(BUDGET), Allocations(found.tensors.values()) as allocations:
            quantizer.lookup(ids, found, torch.float32)
        name = "peak for looking up 3 of 4096 rows"
        measurements.at_most(name, allocations.peak, QUARTER, unit="bytes")

    @pytest.mark.parametrize("rows", ["the first", "the last", "every third, twice"])
    @needs(RANGES, LOOKUP)
    def test_packed_rows_are_joined_by_row_tensors(self, quantizer, rows):
        """If this fails: `row_tensors` lacks a tensor with a row for each row of Ŵ, or has another.

        Experts that a checkpoint has as layers of their own are joined to one weight by them. Name
        each tensor whose row o belongs to row o of Ŵ alone.
        """
        names: tuple[str, ...] = getattr(quantizer, "row_tensors", ())
        if not names:
            pytest.skip(f"{NOT_OFFERED}it names no row_tensors")
        whole = packed(quantizer, (48, 64))
        assert set(names) <= set(whole.tensors), (
            f"row_tensors: expected names of {sorted(whole.tensors)}, got {names}"
        )
        n = whole.shape[0]
        some = {"the first": range(n // 2), "the last": range(n // 2, n)}
        ids = torch.tensor(list(some.get(rows, [*range(0, n, 3), *range(0, n, 3)])))
        layout = quantizer.layout((len(ids), whole.shape[1]))
        tensors = {k: t[ids] if k in names else t for k, t in whole.tensors.items()}
        for name, tensor in tensors.items():
            shape = layout.tensors[name].shape
            assert tuple(tensor.shape) == tuple(shape), (
                f"{name} of {len(ids)} of {n} rows: expected {list(shape)}, as layout says, got "
                f"{list(tensor.shape)}, as row_tensors={names} says"
            )
        found = tile(quantizer, layout.fill(tensors))
        assert same_bits(found, tile(quantizer, whole)[ids]), (
            f"{rows} of {n} packed rows: expected these rows of Ŵ, got others"
        )

    @needs(RANGES)
    def test_a_rescaled_weight_is_scaled_on_both_sides(self, quantizer, measurements):
        """If this fails: `rescaled` gives another weight than diag(v) Ŵ diag(u), or changes Ŵ.

        Multiply u [in] and v [out] into copies of the vectors. Tuning calls it again on the result.
        Without `rescales=True` in the spec, inherit it.
        """
        weight = packed(quantizer, (40, 96))
        draw = generator(50)
        v, u = (1 + 0.2 * torch.rand(n, generator=draw) for n in weight.shape)
        if not quantizer.spec.rescales:
            with pytest.raises(PluginError):
                quantizer.rescaled(weight, u, v)
            pytest.skip(f"{NOT_OFFERED}spec.rescales is false")
        before, W = clone(weight), tile(quantizer, weight)
        once = quantizer.rescaled(weight, u, v)
        twice = quantizer.rescaled(once, 1 / u, 1 / v)
        check_same_bytes(before, weight, "the packed weight after rescaling it")
        limit = 4 * ROUNDING[torch.float16].value  # two vectors in fp16, twice
        for name, found, exact in (("once", once, v[:, None] * W * u), ("and back", twice, W)):
            assert found.layout == weight.layout, (
                f"rescaled {name}: expected the layout {weight.layout}, got {found.layout}"
            )
            error = relative_error(tile(quantizer, found), exact)
            measurements.at_most(f"a weight rescaled {name}", error, limit)
