"""Products with blocks of sums, of a decoder that isn't one of our plugins', against float64: also where a machine has faster ways."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

from modulora_core import kernels
from modulora_core.tests.scaled_rows import DECODER, weight
from modulora_core.tiles import tile_budget

pytest.importorskip("numba")

from modulora_core.kernels import block_choice, products
from modulora_core.plan import workspace

SHAPES = [(1, 1), (3, 700), (15, 31), (28, 64), (300, 513), (530, 260), (40, 2100), (2100, 40)]
"""(out, in): none but the fourth whole blocks, and more of both than is decoded or kept at once."""


@pytest.fixture(scope="module")
def module(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    folder = tmp_path_factory.mktemp("blocks")
    (folder / "outsiders_blocks.py").write_text(DECODER, encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        return importlib.import_module("outsiders_blocks")


def multiplied(
    module: ModuleType,
    packed: tuple[Tensor, Tensor],
    x: Tensor,
    transpose: bool,
    threads: int = 2,
    budget: int = 2**20,
) -> Tensor:
    """``x Ŵᵀ``, or ``x Ŵ``, into memory that held NaN."""
    kernel = module.rows._blocks_transposed if transpose else module.rows._blocks
    y = torch.full((len(x), packed[0].shape[1 if transpose else 0]), torch.nan)
    kernels.launch(kernel, packed, threads, budget, x, y)
    return y


@pytest.mark.parametrize("n", [1, 13, 33, 100])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_products_are_those_of_the_decoded_weight(module: ModuleType, shape: tuple[int, int], n: int) -> None:
    codes, scales, W = weight(*shape)
    for transpose in (False, True):
        M = W if transpose else W.T
        x = torch.randn(n, len(M))
        y = multiplied(module, (codes, scales), x, transpose)
        # an fp32 sum of k products is off by less than k units of the last place of the sum of their magnitudes
        bound = len(M) * 2.0**-23 * (x.double().abs() @ M.abs())
        assert bool(((y - x.double() @ M).abs() <= bound + 1e-30).all())


def test_as_many_rows_as_there_may_be(module: ModuleType) -> None:
    codes, scales, W = weight(70, 300)
    n = block_choice.MOST_ROWS
    for transpose in (False, True):
        M = W if transpose else W.T
        x = torch.randn(n, len(M))
        y = multiplied(module, (codes, scales), x, transpose)
        torch.testing.assert_close(y.double(), x.double() @ M, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("transpose", [False, True])
def test_bits_do_not_depend_on_threads_nor_the_budget_nor_the_rows_beside(
    module: ModuleType, transpose: bool
) -> None:
    codes, scales, _ = weight(600, 560)
    x = torch.randn(50, 600 if transpose else 560)
    one, three = (multiplied(module, (codes, scales), x, transpose, threads) for threads in (1, 3))
    assert torch.equal(one, three)
    assert torch.equal(one, multiplied(module, (codes, scales), x, transpose, budget=1))
    assert torch.equal(multiplied(module, (codes, scales), x[7:9], transpose), one[7:9])


@pytest.mark.parametrize("transpose", [False, True])
def test_what_is_beyond_the_weight_counts_nothing_whatever_is_in_memory(
    module: ModuleType, transpose: bool
) -> None:
    """Blocks are padded: NaN left in scratch by another product must not reach a sum."""
    codes, scales, _ = weight(17, 20)
    poisoned = codes, torch.full_like(scales, torch.nan)
    x = torch.randn(5, 17 if transpose else 20)
    for _ in range(4):  # so that scratch of the right size is free
        multiplied(module, poisoned, x, transpose)
    assert bool(multiplied(module, (codes, scales), x, transpose).isfinite().all())


def test_they_are_taken_between_few_rows_and_those_that_a_tile_is_for(
    module: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    codes, scales, W = weight(40, 48)
    taken: list[int] = []
    launch = products.launch

    def watched(kernel: object, *arguments: object) -> None:
        if kernel is module.rows._blocks:
            taken.append(len(arguments[3]))  # type: ignore[arg-type]
        launch(kernel, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(products, "launch", watched)
    most = block_choice.most_rows((40, 48))
    for faster, expected in ((True, [32, 64, most]), (False, [])):
        monkeypatch.setattr(products, "blocks_are_faster", lambda faster=faster: faster)
        taken.clear()
        for n in (31, 32, 64, most, most + 1):
            x = torch.randn(n, 48)
            y = module.rows.product(x, (40, 48), lambda: (codes, scales), 64, False)
            by_tiles = n > (most if faster else 64)
            assert (y is None) == by_tiles
            if y is not None:
                torch.testing.assert_close(y.double(), x.double() @ W.T, rtol=1e-5, atol=1e-4)
        assert taken == expected


def test_a_plan_measures_more_rows_where_there_are_more() -> None:
    """What such products keep is no tile: a plan that mistook one for the other would be off by a tile."""
    assert block_choice.MOST_ROWS < workspace.ROWS


def test_the_size_of_a_cache_is_what_the_system_says(tmp_path: Path) -> None:
    file = tmp_path / "size"
    assert block_choice.cache_bytes(file) == 2**21
    for said, expected in (("512K\n", 2**19), ("1024K\n", 2**20), ("a lot\n", 2**21)):
        file.write_text(said)
        assert block_choice.cache_bytes(file) == expected


@pytest.mark.parametrize("transpose", [False, True])
def test_a_product_keeps_to_that_share(
    module: ModuleType, transpose: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    codes, scales, _ = weight(40, 48)
    budgets: list[object] = []
    monkeypatch.setattr(products, "blocks_are_faster", lambda: True)
    monkeypatch.setattr(
        products, "launch", lambda _kernel, _weight, _threads, budget, *_: budgets.append(budget)
    )
    monkeypatch.setattr(block_choice, "decoded_bytes", lambda: 12345)
    given, wanted = (40, 48) if transpose else (48, 40)
    module.rows.matmul((codes, scales), torch.randn(64, given), wanted, transpose)
    with tile_budget(100):
        module.rows.matmul((codes, scales), torch.randn(64, given), wanted, transpose)
    assert budgets == [12345, 100 // torch.get_num_threads()]


def test_a_smaller_weight_has_fewer_rows_in_blocks() -> None:
    assert block_choice.most_rows((1024, 1024)) == block_choice.MOST_ROWS
    assert block_choice.most_rows((1023, 1024)) < block_choice.MOST_ROWS
