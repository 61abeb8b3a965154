"""L2: rows or columns of a packed weight, which servers give to processes, are cut from it."""

from __future__ import annotations

from itertools import pairwise

import pytest

from modulora_conformance.cases import packed, tile
from modulora_conformance.changes import check_same_bytes, clone, same_bits
from modulora_conformance.checks import Level, needs
from modulora_conformance.levels.tiles import RANGES
from modulora_conformance.results import NOT_OFFERED
from modulora_core.spec import Quantizer

SHAPE = (384, 768)
"""Three parts, and six: of blocks of 128, and of all smaller powers of two."""

CUTS = (0, 1, 32, 64, 96, 128, 192, 256, 320, 384)
"""Rows, and half the columns, at which the weight is cut; a quantizer refuses most of them."""


class Sliced(Level):
    """`sliced` gives rows or columns of Ŵ, for the cuts that a quantizer offers."""

    level, title = "L2", "tiles"

    @pytest.mark.parametrize("dim", [0, 1], ids=["rows", "columns"])
    @needs(RANGES)
    def test_a_sliced_weight_is_its_part(self, quantizer: Quantizer, dim: int) -> None:
        """If this fails: `sliced` gives other values than rows or columns [start, stop) of Ŵ.

        Return None for a cut that isn't exact: the server keeps the whole weight then.
        """
        weight = packed(quantizer, SHAPE)
        before, W = clone(weight), tile(quantizer, weight)
        scale, granted = SHAPE[dim] // CUTS[-1], 0
        ranges = [*pairwise(CUTS), (0, 128), (128, 256), (0, 256), (96, 384), (1, 3)]
        for start, stop in ((scale * a, scale * b) for a, b in ranges):
            part = quantizer.sliced(weight, dim, start, stop)
            if part is None:
                continue
            granted += 1
            case = f"{('rows', 'columns')[dim]} [{start}, {stop})"
            shape = (stop - start, SHAPE[1]) if dim == 0 else (SHAPE[0], stop - start)
            assert part.shape == shape, f"{case}: expected {list(shape)}, got {list(part.shape)}"
            expected = W.narrow(dim, start, stop - start)
            assert same_bits(tile(quantizer, part), expected), f"{case}: not the bits of Ŵ"
        check_same_bytes(before, weight, "the packed weight after cutting it")
        if not granted:
            pytest.skip(f"{NOT_OFFERED}it refuses these cuts")
