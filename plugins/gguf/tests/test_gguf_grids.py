"""The grids of single codes: their points are the tiles' bits, and other codes keep all scales."""

import numpy as np
import pytest
import torch
from modulora_gguf import reference
from modulora_gguf.grids import GRIDS
from modulora_gguf.quantizer import GGUF, Options

from modulora_core.errors import PluginError

ROWS, BLOCKS = 9, 3


def of_any_bytes(kind):
    quantizer = GGUF(Options(type=kind))
    size, nbytes = reference.block_of(kind)
    blocks = np.random.default_rng(0).integers(0, 256, (ROWS, BLOCKS * nbytes), dtype=np.uint8)
    layout = quantizer.layout((ROWS, BLOCKS * size))
    return quantizer, layout.fill({"blocks": torch.from_numpy(blocks)})


@pytest.mark.parametrize("kind", GRIDS)
def test_the_points_of_the_codes_are_the_tile_bit_for_bit(kind):
    quantizer, packed = of_any_bytes(kind)
    tile = reference.tile(packed, (0, ROWS))
    grid = quantizer.grid(packed, (0, ROWS), (0, packed.shape[1]))
    assert torch.equal(grid.points(quantizer.codes(packed)), tile)
    codes = quantizer.codes(packed)
    for rows, columns in (((2, 7), (31, 34)), ((0, 9), (packed.shape[1] - 1, packed.shape[1]))):
        at = slice(*rows), slice(*columns)
        assert torch.equal(quantizer.grid(packed, rows, columns).points(codes[at]), tile[at])


def test_types_whose_codes_are_of_several_weights_have_no_grid():
    quantizer, packed = of_any_bytes("IQ2_XS")
    assert not quantizer.snaps
    with pytest.raises(PluginError, match=r"expected a type that snaps, .*, got IQ2_XS"):
        quantizer.snapped(packed, torch.zeros(packed.shape))
