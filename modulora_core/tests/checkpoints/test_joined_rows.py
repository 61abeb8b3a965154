"""Rows of several packed weights are one weight, with tiles, products and gradients of all."""

import pytest
import torch

from modulora_core.autograd import FrozenWeight, packed_product
from modulora_core.checkpoints.joined_rows import join
from modulora_core.checkpoints.record import Recipe
from modulora_core.errors import CheckpointError
from modulora_core.models.formats import ForeignWeight
from modulora_core.packed import PackedLayout
from modulora_core.registry import create

pytestmark = pytest.mark.usefixtures("toy")


@pytest.fixture
def joined():
    """A quantizer, [5 + 3 + 2, 6] of three parts, and the dense weight."""
    quantizers = [create("toy", {"levels": 7}), create("verbatim"), create("toy", {"levels": 127})]
    parts, tiles = [], []
    for quantizer, rows in zip(quantizers, (5, 3, 2), strict=True):
        packed = quantizer.pack(torch.randn(rows, 6))
        tiles.append(quantizer.dequantize_tile(packed, (0, rows), torch.float64))
        parts.append(ForeignWeight((), quantizer, packed.layout, lambda _, packed=packed: packed))
    weight = join(parts)
    return weight.quantizer, weight.unpack(lambda name: torch.empty(0)), torch.cat(tiles)


def test_tiles_and_products_are_those_of_all_rows(joined):
    quantizer, packed, W = joined
    for rows in [(0, 10), (4, 9), (5, 8), (6, 7), (8, 10), (3, 3), (10, 10)]:
        tile = quantizer.dequantize_tile(packed, rows, torch.float64)
        assert torch.equal(tile, W[slice(*rows)])
    x = torch.randn(2, 3, 6, dtype=torch.float64, requires_grad=True)
    y, dY = (
        packed_product(x, FrozenWeight(quantizer, packed)),
        torch.randn(2, 3, 10, dtype=torch.float64),
    )
    y.backward(dY)
    torch.testing.assert_close(y, x @ W.T)
    torch.testing.assert_close(x.grad, dY @ W)


def test_damaged_parts_are_refused(joined):
    quantizer, packed, _ = joined
    whole = packed.layout.to_json()
    first, *others = whole["metadata"]["parts"]
    changed = ({"shape": [4, 6]}, {"shape": [5, 7]}, {"format": 2})
    wrong_lists = (None, [], others, [first, *others, first])
    for parts in (*wrong_lists, *([first | change, *others] for change in changed)):
        with pytest.raises(CheckpointError):
            quantizer.check_format(PackedLayout.from_json({**whole, "metadata": {"parts": parts}}))
    recipe = Recipe.of(quantizer).model_dump()
    for wrong in (None, [recipe], [{}]):  # joined rows of joined rows, fields that are missing
        with pytest.raises(ValueError, match="Recipe"):
            Recipe.model_validate({**recipe, "options": {"parts": wrong}})
