"""L2: weights as large as real layers are packed and read as small ones."""

from __future__ import annotations

import pytest
import torch

from modulora_conformance import real
from modulora_conformance.cases import fit, generator, tile
from modulora_conformance.changes import same_bits
from modulora_conformance.checks import Level, needs
from modulora_conformance.levels.accuracy import PROMISED, WIDTHS, long_packed
from modulora_conformance.levels.lookups import LOOKUP
from modulora_conformance.levels.packing import DETERMINISTIC, LAYOUT, no_promise, promise_of
from modulora_conformance.levels.tiles import OWNED, RANGES
from modulora_conformance.real import Outcome
from modulora_conformance.results import PACKING, Measurements
from modulora_core.spec import Promise, Quantizer

REAL = "test_a_real_layer_keeps_the_error_in_every_piece"
REAL_TILES = "test_tiles_of_a_real_layer_equal_the_whole"
COMMON = "test_layers_with_common_sides_keep_the_error_in_every_piece"

BEFORE = (DETERMINISTIC, PROMISED, WIDTHS, RANGES, OWNED, LAYOUT)

COLUMNS = (576, 1536, 4096, 11_008)
"""Widths of real layers; the promise is for 2048."""

PROMISED_COLUMNS = 2048

ROUNDED = 1.01
"""Room for a promise of two digits."""


class RealWeights(Level):
    """Weights of more than 2²⁴ elements, and of sides that kernels are cut for, are as exact."""

    level, title = "L2", "tiles"

    @needs("test_bits_per_weight_keep_the_promise", LAYOUT)
    def test_bits_per_weight_keep_the_promise_at_other_widths(self, quantizer, measurements):
        """If this fails: layers of other widths take more bytes than the spec promises.

        Rows are padded to a large multiple, or a scale is stored more often. The codes must take
        their width, and all else the promised share: at fewer columns, 2048 / in times as much.
        """
        promise = promise_of(quantizer) or pytest.skip(no_promise(quantizer))
        for columns in COLUMNS:
            shape = fit(quantizer, PROMISED_COLUMNS, columns)
            bits = quantizer.layout(shape).bits_per_weight
            limit = ROUNDED * _promised_bits(quantizer, promise, shape[1])
            name = "bits per weight at other widths"
            measurements.at_most(name, bits, limit, unit="bits", case=f"{shape[1]} columns")

    @needs(*BEFORE)
    def test_a_real_layer_keeps_the_error_in_every_piece(self, quantizer, measurements):
        """If this fails: in a weight of 17 million elements, a row, column or piece is wrong.

        An index is a float or a byte, or blocks of megabytes are swapped or left out. Each row has
        another size and mean in every 128 columns. The limit is three times a small weight's error.
        """
        found = real.big(quantizer)
        name = f"{PACKING}{list(found.shape)}"
        measurements.at_most(name, found.seconds, float("inf"), unit="seconds")
        _check_pieces(quantizer, found, measurements)

    @needs(*BEFORE)
    def test_layers_with_common_sides_keep_the_error_in_every_piece(self, quantizer, measurements):
        """If this fails: a side of 256, 896, 1024 or 4095 rows or columns is packed or read
        wrongly.

        A kernel has a path for such sides. Compare its last block with the reference's.
        """
        for found in real.sides(quantizer):
            _check_pieces(quantizer, found, measurements)

    @needs(REAL, COMMON)
    def test_tiles_of_a_real_layer_equal_the_whole(self, quantizer):
        """If this fails: a tile of many megabytes differs from the same rows in a small tile.

        Blocks of a large tile are decoded in another order, or an offset does not fit its dtype.
        """
        for found in (real.big(quantizer), *real.sides(quantizer)):
            assert real.RANGES not in found.faults, found.faults[real.RANGES][0]

    @needs(LOOKUP, "test_long_weights_keep_the_error")
    def test_hundreds_of_distant_ids_give_the_rows_of_the_tile(self, quantizer):
        """If this fails: `lookup` of many ids, unsorted and repeated, gives other rows.

        Vocabularies have more rows than 16 bits count: use int64 for offsets.
        """
        table = long_packed(quantizer, "few columns")
        n, draw = table.shape[0], generator(60)
        ends = torch.tensor([0, n - 1, 2**15 - 1, 2**15, 2**15 + 1, 2**16 - 1, 2**16, 2**16 + 1])
        ids = torch.cat([torch.randint(n, (240,), generator=draw), ends.clamp(max=n - 1)])
        ids = torch.cat([ids, ids[:37]])[torch.randperm(285, generator=draw)].view(19, 15)
        few = torch.cat([ids[:2].flatten(), ends.clamp(max=n - 1)])
        for asked, out in ((ids.int(), torch.float32), (few, torch.bfloat16)):
            rows, whole = quantizer.lookup(asked, table, out), tile(quantizer, table, out)
            assert same_bits(rows, whole[asked]), (
                f"{asked.numel()} ids of a {list(table.shape)} table, {asked.dtype} to {out}: "
                "expected the rows of the tile, got others"
            )


def _promised_bits(quantizer: Quantizer, promise: Promise, columns: int) -> float:
    """The promise at a width: the rest beside the codes grows as columns become fewer."""
    stored = [b for b in quantizer.spec.bits if b <= promise.bits_per_weight]
    codes = max(stored, default=0.0)
    rest = promise.bits_per_weight - codes
    return codes + rest * max(1.0, PROMISED_COLUMNS / columns)


def _check_pieces(quantizer: Quantizer, found: Outcome, measurements: Measurements) -> None:
    assert real.LAYOUT not in found.faults, found.faults[real.LAYOUT][0]
    limits = real.limit_of_pieces(quantizer, found.shape)
    for name, error in found.pieces.items():
        case = f"the worst of a {list(found.shape)} weight"
        measurements.at_most(f"error of {name}", error, limits[name], case=case)
