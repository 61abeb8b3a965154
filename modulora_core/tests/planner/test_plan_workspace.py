"""What a plan says of a product that takes a tile, beside that product."""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType

import pytest
import torch

from modulora_core import registry
from modulora_core.devices import dense_products
from modulora_core.devices.memory import Allocations
from modulora_core.planner import workspace
from modulora_core.tiles import CPU_TILE_BYTES, tile_budget

MEASURED = workspace._without_tile, workspace._many_rows


@pytest.fixture(params=[False, True], ids=["torch", "oneDNN"])
def library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Dense products are made by either, whatever this processor's would be."""
    if request.param and not torch.backends.mkldnn.is_available():
        pytest.skip("torch is built without oneDNN")
    monkeypatch.setattr(dense_products, "onednn_is_faster", lambda: request.param)
    for measured in MEASURED:
        measured.cache_clear()
    yield
    for measured in MEASURED:
        measured.cache_clear()


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("rows", [96, 256, 700])
@pytest.mark.parametrize("shape", [(512, 1408), (1408, 512), (4096, 1536)], ids=str)
def test_it_is_what_such_a_product_takes(
    toy: ModuleType, shape: tuple[int, int], rows: int, transpose: bool
) -> None:
    """The last shape takes two tiles, of a quantizer that decodes into one and into nothing else."""
    quantizer = registry.create("verbatim")
    packed = quantizer.pack(torch.randn(shape))
    x = torch.zeros(rows, shape[0 if transpose else 1])
    with torch.no_grad(), tile_budget(CPU_TILE_BYTES):
        quantizer.matmul(x, packed, transpose)
        with Allocations([x, *packed.tensors.values()]) as allocations:
            y = quantizer.matmul(x, packed, transpose)
    real = allocations.peak - y.numel() * y.element_size()
    planned = workspace.product_workspace(
        quantizer, shape, x.dtype, rows, CPU_TILE_BYTES, transpose
    )
    assert planned == pytest.approx(real, rel=0.08)
