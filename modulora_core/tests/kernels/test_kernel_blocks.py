"""Products with blocks of sums, by AVX's multiplications and by AMX's, of a decoder that isn't one of our plugins', against float64:
also where a machine has faster ways.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

from modulora_core import kernels
from modulora_core.devices.dense_products import matmul_precision
from modulora_core.tests.scaled_rows import DECODER, weight
from modulora_core.tiles import tile_budget

pytest.importorskip("numba")

from modulora_core.kernels import choices
from modulora_core.kernels.cpu import amx
from modulora_core.kernels.cpu import cpu_kernels as products

SHAPES = [(1, 1), (3, 700), (15, 31), (28, 64), (300, 513), (530, 260), (40, 2100), (2100, 40)]
"""(out, in): none but the fourth whole blocks, and more of both than is decoded or kept at once."""


@pytest.fixture(scope="module")
def module(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    folder = tmp_path_factory.mktemp("blocks")
    (folder / "outsiders_blocks.py").write_text(DECODER, encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        return importlib.import_module("outsiders_blocks")


WAYS = {"avx": 0, "amx, one slice": 1, "amx, two": 2, "amx, three": 3}
"""Slices that fp32 numbers are taken apart into."""


@pytest.fixture(params=WAYS)
def slices(request: pytest.FixtureRequest) -> int:
    count = WAYS[request.param]
    if count and not amx.available():
        pytest.skip("this machine has no AMX")
    return count


def multiplied(
    module: ModuleType,
    packed: tuple[Tensor, Tensor],
    x: Tensor,
    transpose: bool,
    slices: int,
    threads: int = 2,
    budget: int = 2**20,
) -> Tensor:
    """``x Ŵᵀ``, or ``x Ŵ``, into memory that held NaN."""
    kernels_of_both, options = (
        (module.rows._squares, (slices,)) if slices else (module.rows._blocks, ())
    )
    y = torch.full((len(x), packed[0].shape[1 if transpose else 0]), torch.nan)
    kernels.launch(kernels_of_both[transpose], packed, threads, budget, *options, x, y)
    return y


def allowed(slices: int, terms: int) -> float:
    """How far a sum of so many products may be off, as a part of the sum of their magnitudes. Each addition rounds by 2^-24, and so does
    each product that AVX adds. A slice is at most 2^-8 of the one before; those whose numbers together are as many as the slices, or more,
    aren't multiplied.
    """
    left_out = {0: 0.0, 1: 2 * 2.0**-8 + 2.0**-16, 2: 3 * 2.0**-16, 3: 2 * 2.0**-24 + 2.0**-32}
    additions = slices * (slices + 1) // 2 or 2
    return terms * additions * 2.0**-24 + left_out[slices]


@pytest.mark.parametrize("n", [1, 13, 33, 100])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_products_are_those_of_the_decoded_weight(
    module: ModuleType, shape: tuple[int, int], n: int, slices: int
) -> None:
    codes, scales, W = weight(*shape)
    for transpose in (False, True):
        M = W if transpose else W.T
        x = torch.randn(n, len(M))
        y = multiplied(module, (codes, scales), x, transpose, slices)
        bound = allowed(slices, len(M)) * (x.double().abs() @ M.abs())
        assert bool(((y - x.double() @ M).abs() <= bound + 1e-30).all())


def test_as_many_rows_as_there_may_be(module: ModuleType, slices: int) -> None:
    codes, scales, W = weight(70, 300)
    n = choices.MOST_ROWS
    for transpose in (False, True):
        M = W if transpose else W.T
        x = torch.randn(n, len(M))
        y = multiplied(module, (codes, scales), x, transpose, slices)
        bound = allowed(slices, len(M)) * (x.double().abs() @ M.abs())
        assert bool(((y - x.double() @ M).abs() <= bound).all())


@pytest.mark.parametrize("transpose", [False, True])
def test_bits_do_not_depend_on_threads_nor_the_budget_nor_the_rows_beside(
    module: ModuleType, transpose: bool, slices: int
) -> None:
    codes, scales, _ = weight(600, 560)
    x = torch.randn(50, 600 if transpose else 560)
    one, three = (
        multiplied(module, (codes, scales), x, transpose, slices, threads=threads)
        for threads in (1, 3)
    )
    assert torch.equal(one, three)
    assert torch.equal(one, multiplied(module, (codes, scales), x, transpose, slices, budget=1))
    assert torch.equal(multiplied(module, (codes, scales), x[7:9], transpose, slices), one[7:9])


@pytest.mark.parametrize("transpose", [False, True])
def test_what_is_beyond_the_weight_counts_nothing_whatever_is_in_memory(
    module: ModuleType, transpose: bool, slices: int
) -> None:
    """Blocks are padded: NaN left in scratch by another product must not reach a sum."""
    codes, scales, _ = weight(17, 20)
    poisoned = codes, torch.full_like(scales, torch.nan)
    x = torch.randn(5, 17 if transpose else 20)
    for _ in range(4):  # so that scratch of the right size is free
        multiplied(module, poisoned, x, transpose, slices)
    assert bool(multiplied(module, (codes, scales), x, transpose, slices).isfinite().all())


@pytest.mark.parametrize("transpose", [False, True])
def test_what_is_not_finite_stays_in_its_row(
    module: ModuleType, transpose: bool, slices: int
) -> None:
    codes, scales, _ = weight(40, 70)
    x = torch.randn(5, 40 if transpose else 70)
    expected = multiplied(module, (codes, scales), x, transpose, slices)
    x[1, 3], x[3, 4] = torch.nan, torch.inf
    y = multiplied(module, (codes, scales), x, transpose, slices)
    assert not bool(y[[1, 3]].isfinite().any())
    assert torch.equal(y[::2], expected[::2])


@pytest.mark.skipif(not amx.available(), reason="this machine has no AMX")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bf16_is_one_slice_of_fp32(module: ModuleType, shape: tuple[int, int]) -> None:
    codes, scales, _ = weight(*shape)
    for transpose in (False, True):
        x = torch.randn(33, shape[0 if transpose else 1]).bfloat16()
        y, wide = (
            multiplied(module, (codes, scales), given, transpose, 1) for given in (x, x.float())
        )
        assert torch.equal(y, wide)


@pytest.mark.skipif(not amx.available(), reason="this machine has no AMX")
@pytest.mark.parametrize("rows", [choices.ROWS_BEFORE_AMX + 1, choices.ROWS_OF_AMX])
def test_amx_takes_bf16_up_to_as_many_rows_as_it_is_faster_for(
    module: ModuleType, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(choices, "LEAST_FOR_AMX", 40 * 48)
    codes, scales, W = weight(40, 48)
    for transpose in (False, True):
        M = W if transpose else W.T
        x = torch.randn(rows + 1, len(M)).bfloat16()
        y = module.rows.product(x[1:], (40, 48), lambda: (codes, scales), 8, transpose)
        assert y is not None
        assert y.dtype == torch.bfloat16
        exact = x[1:].double() @ M
        bound = (2.0**-8 + allowed(1, len(M))) * (
            x[1:].double().abs() @ M.abs()
        )  # the result is rounded too
        assert bool(((y.double() - exact).abs() <= bound).all())
        if rows == choices.ROWS_OF_AMX:
            assert module.rows.product(x, (40, 48), lambda: (codes, scales), 8, transpose) is None


@pytest.mark.skipif(not amx.available(), reason="this machine has no AMX")
@pytest.mark.parametrize("transpose", [False, True])
def test_three_slices_are_as_exact_as_fp32(module: ModuleType, transpose: bool) -> None:
    codes, scales, W = weight(2048, 2048)
    M = W if transpose else W.T
    x = torch.randn(64, 2048)
    expected = x.double() @ M

    def error(y: Tensor) -> float:
        return float((y - expected).square().mean().sqrt() / expected.square().mean().sqrt())

    three, two = (
        error(multiplied(module, (codes, scales), x, transpose, slices)) for slices in (3, 2)
    )
    assert three <= 1.5 * error(x @ M.float()) < two


def test_they_are_taken_between_few_rows_and_those_that_a_tile_is_for(
    module: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    codes, scales, W = weight(40, 48)
    taken: list[int] = []
    launch = products.launch

    def watched(kernel: object, *arguments: object) -> None:
        if kernel is module.rows._blocks[False]:
            taken.append(len(arguments[3]))  # type: ignore[arg-type]
        launch(kernel, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(products, "launch", watched)
    monkeypatch.setattr(amx, "available", lambda: False)
    most = choices.most_rows((40, 48))
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


@pytest.mark.skipif(not amx.available(), reason="this machine has no AMX")
@pytest.mark.parametrize(("precision", "slices"), [("highest", 3), ("high", 2), ("medium", 2)])
def test_amx_takes_more_rows_than_few_however_many(
    module: ModuleType, monkeypatch: pytest.MonkeyPatch, precision: str, slices: int
) -> None:
    codes, scales, W = weight(40, 48)
    taken: list[tuple[int, int]] = []
    launch = products.launch

    def watched(kernel: object, *arguments: object) -> None:
        if kernel in module.rows._squares:
            taken.append((arguments[3], len(arguments[4])))  # type: ignore[arg-type]
        launch(kernel, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(products, "launch", watched)
    monkeypatch.setattr(choices, "LEAST_FOR_AMX", 40 * 48)
    least, most = choices.LEAST_ROWS_OF_SLICES[slices], choices.MOST_ROWS
    with matmul_precision(precision):
        for n in (least - 1, least, 2 * most + 1):
            for transpose in (False, True):
                M = W if transpose else W.T
                x = torch.randn(n, len(M))
                y = module.rows.product(x, (40, 48), lambda: (codes, scales), 64, transpose)
                assert y is not None
                bound = allowed(slices, len(M)) * (x.double().abs() @ M.abs())
                assert bool(((y - x.double() @ M).abs() <= bound + 1e-30).all())
    assert taken == [(slices, rows) for rows in (least, least, *2 * [most, most, 1])]
    assert (
        module.rows.product(
            torch.randn(most, 48), (39, 48), lambda: (codes[:39], scales[:39]), 64, False
        )
        is None
    )


def test_the_size_of_a_cache_is_what_the_system_says(tmp_path: Path) -> None:
    file = tmp_path / "size"
    assert choices.cache_bytes(file) == 2**21
    for said, expected in (("512K\n", 2**19), ("1024K\n", 2**20), ("a lot\n", 2**21)):
        file.write_text(said)
        assert choices.cache_bytes(file) == expected


@pytest.mark.parametrize("transpose", [False, True])
def test_a_product_keeps_to_that_share(
    module: ModuleType, transpose: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    codes, scales, _ = weight(40, 48)
    budgets: list[object] = []
    monkeypatch.setattr(products, "blocks_are_faster", lambda: True)
    monkeypatch.setattr(amx, "available", lambda: False)
    monkeypatch.setattr(
        products, "launch", lambda _kernel, _weight, _threads, budget, *_: budgets.append(budget)
    )
    monkeypatch.setattr(choices, "decoded_bytes", lambda: 12345)
    given, wanted = (40, 48) if transpose else (48, 40)
    module.rows.matmul((codes, scales), torch.randn(64, given), wanted, transpose)
    with tile_budget(100):
        module.rows.matmul((codes, scales), torch.randn(64, given), wanted, transpose)
    assert budgets == [12345, 100 // torch.get_num_threads()]


def test_a_smaller_weight_has_fewer_rows_in_blocks() -> None:
    assert choices.most_rows((1024, 1024)) == choices.MOST_ROWS
    assert choices.most_rows((1023, 1024)) < choices.MOST_ROWS
