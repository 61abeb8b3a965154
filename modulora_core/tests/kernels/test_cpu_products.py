"""Tiles and products of a decoder that no plugin of ours has, against float64, by every loop."""

from __future__ import annotations

import importlib
from types import ModuleType

import pytest
import torch
from torch import Tensor

from modulora_core.packed import PackedWeight
from modulora_core.tests.scaled_rows import DECODER, packed
from modulora_core.tiles import tile_budget

pytest.importorskip("numba")

from modulora_core.kernels.cpu import amx, choices
from modulora_core.kernels.cpu.choices import Way

SHAPES = [(1, 1), (5, 3), (17, 130), (300, 513), (33, 2100), (2100, 40)]
"""(out, in): no multiple of a block, and more of both than is decoded at once."""

WAYS = [
    Way("products", torch.float32),
    Way("products", torch.bfloat16),
    Way("blocks", torch.float32),
    *(Way("amx", torch.float32, slices) for slices in (1, 2, 3)),
    Way("amx", torch.bfloat16),
]


@pytest.fixture(scope="module")
def module(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    folder = tmp_path_factory.mktemp("rows")
    (folder / "outsiders_rows.py").write_text(DECODER, encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        return importlib.import_module("outsiders_rows")


@pytest.fixture(params=WAYS, ids=lambda way: f"{way.loops} {way.dtype} {way.slices}")
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Way:
    """All products go this way."""
    if request.param.loops == "amx" and not amx.available():
        pytest.skip("this machine has no AMX")
    monkeypatch.setattr(choices, "way_for", lambda *_: request.param)
    return request.param


def product(module: ModuleType, weight: PackedWeight, x: Tensor, transpose: bool) -> Tensor:
    y = module.product(x, weight, transpose)
    assert y.shape == (*x.shape[:-1], weight.shape[1 if transpose else 0])
    assert y.dtype == x.dtype
    return y


def allowed(way: Way, terms: int) -> float:
    """The error of a sum of so many products, as a part of the sum of their magnitudes.

    Each addition rounds by 2⁻²⁴. A slice is at most 2⁻⁸ of the one before, and products of slices whose numbers add up
    to the number of slices or more are left out. bf16 rounds weights and results by 2⁻⁹, and inputs.
    """
    left_out = {1: 2 * 2.0**-8 + 2.0**-16, 2: 3 * 2.0**-16, 3: 2 * 2.0**-24 + 2.0**-32}
    additions = way.slices * (way.slices + 1) // 2 + 1
    rounding = terms * additions * 2.0**-24 + (left_out[way.slices] if way.loops == "amx" else 0)
    return rounding + (3 * 2.0**-9 if way.dtype is torch.bfloat16 else 0)


@pytest.mark.parametrize("n", [1, 4, 13, 33])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_products_are_those_of_the_decoded_weight(
    module: ModuleType, way: Way, shape: tuple[int, int], n: int
) -> None:
    weight, W = packed(*shape)
    for transpose in (False, True):
        M = W if transpose else W.T
        x = torch.randn(n, len(M))
        bound = allowed(way, len(M)) * (x.double().abs() @ M.abs())
        error = (product(module, weight, x, transpose) - x.double() @ M).abs()
        assert bool((error <= bound + 1e-30).all())


@pytest.mark.parametrize("transpose", [False, True])
def test_bits_do_not_depend_on_threads_nor_the_budget_nor_the_rows_beside(
    module: ModuleType, way: Way, transpose: bool
) -> None:
    weight, _ = packed(600, 560)
    x, before = torch.randn(50, 600 if transpose else 560), torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(product(module, weight, x, transpose))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*found)
    with tile_budget(1):
        assert torch.equal(found[0], product(module, weight, x, transpose))
    assert torch.equal(product(module, weight, x[4:8], transpose), found[0][4:8])
