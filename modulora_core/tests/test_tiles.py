from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from modulora_core import tiles
from modulora_core.errors import OptionError, ShapeError
from modulora_core.tiles import (
    CPU_TILE_BYTES,
    looked_up,
    tile_budget,
    tile_bytes,
    tile_ranges,
    tiled_matmul,
)

CPU = torch.device("cpu")


def tiles_of(W: Tensor):  # type: ignore[no-untyped-def]
    return lambda start, stop, dtype: W[start:stop].to(dtype)


@pytest.mark.parametrize("rows", [1, 2, 7, 64, 1000])
@pytest.mark.parametrize("budget", [1, 40, 4096, 10**9])
def test_tile_ranges_partition_the_rows_within_the_budget(rows: int, budget: int) -> None:
    ranges = list(tile_ranges(rows, 40, budget))
    assert [i for start, stop in ranges for i in range(start, stop)] == list(range(rows))
    assert all((stop - start) * 40 <= budget or stop - start == 1 for start, stop in ranges)


def test_no_rows_have_no_tiles() -> None:
    assert list(tile_ranges(0, 40, 4096)) == []


def test_budget_comes_from_the_block_then_the_environment_then_the_default(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("MODULORA_TILE_BYTES", raising=False)
    assert tile_bytes(CPU) == CPU_TILE_BYTES
    monkeypatch.setenv("MODULORA_TILE_BYTES", "12345")
    assert tile_bytes(CPU) == 12345
    with tile_budget(99):
        assert tile_bytes(CPU) == 99
        with tile_budget(98):
            assert tile_bytes(CPU) == 98
        assert tile_bytes(CPU) == 99
    assert tile_bytes(CPU) == 12345


def test_a_budget_holds_for_the_threads_in_which_autograd_runs_a_backward_on_a_gpu() -> None:
    with tile_budget(99), ThreadPoolExecutor(1) as autograd:
        assert autograd.submit(tile_bytes, CPU).result() == 99


@pytest.mark.parametrize("text", ["0", "-1", "4MiB", ""])
def test_a_budget_that_is_no_positive_number_is_refused(
    text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MODULORA_TILE_BYTES", text)
    with pytest.raises(OptionError, match="MODULORA_TILE_BYTES"):
        tile_bytes(CPU)
    with pytest.raises(OptionError, match="tile budget"), tile_budget(0):
        pass


@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("budget", [1, 1000, 10**9])
@pytest.mark.parametrize("leading", [(), (1,), (0,), (3, 5), (2, 0, 3)])
def test_tiled_matmul_equals_the_dense_product(
    transpose: bool, budget: int, leading: tuple[int, ...]
) -> None:
    torch.manual_seed(0)
    W = torch.randn(37, 23, dtype=torch.float64)
    x = torch.randn(*leading, 37 if transpose else 23, dtype=torch.float64)
    y = tiled_matmul(x, tiles_of(W), (37, 23), transpose, budget=budget)
    assert y.shape == (*leading, 23 if transpose else 37)
    torch.testing.assert_close(y, x @ W if transpose else x @ W.t(), rtol=1e-12, atol=1e-12)


@pytest.fixture(params=[False, True], ids=["no-bf16-units", "bf16-units"])
def units(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether the processor is taken for one that multiplies bf16 numbers; torch does anyway, faster or slower."""
    monkeypatch.setattr(tiles, "has_bfloat16_units", lambda: request.param)
    return bool(request.param)


def test_units_that_torch_was_told_not_to_use_are_none() -> None:
    code = "import torch; from modulora_core import tiles; print(tiles.compute_dtype(torch.bfloat16, torch.device('cpu')))"
    environment = os.environ | {"ONEDNN_MAX_CPU_ISA": "AVX2"}
    told = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert told.stdout == "torch.float32\n"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("budget", [10_000, 10**9])
def test_sixteen_bit_inputs_are_summed_in_fp32_and_rounded_once(
    dtype: torch.dtype, transpose: bool, budget: int, units: bool
) -> None:
    torch.manual_seed(0)
    W = torch.randn(300, 200).to(dtype)
    x = torch.randn(9, 300 if transpose else 200).to(dtype)
    y = tiled_matmul(x, tiles_of(W), (300, 200), transpose, budget=budget)
    exact = x.double() @ (W.double() if transpose else W.double().t())

    def rounding(product: Tensor) -> Tensor:
        """Half an ulp of a 16-bit result, and the fp32 sums' own rounding on top."""
        return (
            0.51
            * torch.finfo(dtype).eps
            * product.abs().clamp_min(torch.finfo(dtype).smallest_normal)
        )

    allowed = rounding(exact) + 1e-4
    if transpose and units and dtype == torch.bfloat16:  # a tile's product comes rounded from torch
        for start, stop in tile_ranges(300, 200 * 2, budget):
            allowed += rounding(x[:, start:stop].double() @ W[start:stop].double())
    assert y.dtype == dtype
    assert ((y.double() - exact).abs() <= allowed).all()


def test_x_of_the_wrong_width_is_refused_with_both_shapes() -> None:
    with pytest.raises(ShapeError, match=r"expected x of shape \[\.\.\., 23\], got \[2, 37\]"):
        tiled_matmul(torch.ones(2, 37), tiles_of(torch.ones(37, 23)), (37, 23))


@pytest.mark.parametrize("transpose", [False, True])
def test_tiles_have_the_inputs_dtype_where_the_cpu_multiplies_it_fast(
    units: bool, transpose: bool
) -> None:
    asked = []

    def tile(start: int, stop: int, dtype: torch.dtype) -> Tensor:
        asked.append(dtype)
        return torch.ones(stop - start, 8, dtype=dtype)

    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        assert tiled_matmul(torch.ones(2, 8, dtype=dtype), tile, (8, 8), transpose).dtype == dtype
    assert asked == [
        torch.bfloat16 if units else torch.float32,
        torch.float32,
        torch.float32,
        torch.float64,
    ]


def test_autocast_does_not_change_the_dtype_of_a_product(units: bool) -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = tiled_matmul(torch.full((2, 8), 1.001), tiles_of(torch.ones(4, 8)), (4, 8))
    torch.testing.assert_close(y, torch.full((2, 4), 8.008))


def test_non_contiguous_x_is_multiplied_as_it_reads() -> None:
    W = torch.randn(5, 4)
    x = torch.randn(4, 6).t()
    torch.testing.assert_close(tiled_matmul(x, tiles_of(W), (5, 4)), x @ W.t())


@pytest.mark.parametrize("transpose", [False, True])
def test_no_rows_are_multiplied_by_no_tile(transpose: bool) -> None:
    """A model whose logits are deferred asks its head for none, each step."""

    def tile(*_: object) -> torch.Tensor:
        raise AssertionError("decoded for nothing")

    x = torch.randn(2, 0, 5 if transpose else 7, dtype=torch.bfloat16)
    y = tiled_matmul(x, tile, (5, 7), transpose)
    assert y.shape == (2, 0, 7 if transpose else 5)
    assert y.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("shape", "transpose"), [((0, 4), False), ((0, 4), True), ((4, 0), False), ((4, 0), True)]
)
def test_a_weight_without_rows_or_columns_is_multiplied_too(
    shape: tuple[int, int], transpose: bool
) -> None:
    W = torch.ones(shape)
    x = torch.ones(2, 3, shape[0] if transpose else shape[1])
    assert torch.equal(
        tiled_matmul(x, tiles_of(W), shape, transpose), x @ W if transpose else x @ W.t()
    )


@pytest.mark.parametrize("budget", [1, 200, 10**9])
@pytest.mark.parametrize("shape", [(), (0,), (9,), (3, 4)])
def test_rows_that_are_looked_up_are_those_of_the_whole(
    shape: tuple[int, ...], budget: int
) -> None:
    W = torch.randn(37, 23, generator=torch.Generator().manual_seed(0))
    ids = torch.randint(0, 37, shape, generator=torch.Generator().manual_seed(1))
    found = looked_up(ids, tiles_of(W), (37, 23), torch.bfloat16, budget=budget)
    assert torch.equal(found, W.bfloat16()[ids])


def test_a_row_is_decoded_once_and_neighbours_together_within_the_budget() -> None:
    W = torch.randn(37, 23)
    asked: list[tuple[int, int]] = []

    def tile(start: int, stop: int, dtype: torch.dtype) -> Tensor:
        asked.append((start, stop))
        return W[start:stop].to(dtype)

    ids = torch.tensor([[36, 4, 5], [4, 8, 6], [0, 36, 7]])
    assert torch.equal(looked_up(ids, tile, (37, 23), torch.float32, budget=4 * 23 * 3), W[ids])
    assert asked == [(0, 1), (4, 7), (7, 9), (36, 37)]


def test_on_a_gpu_short_gaps_are_decoded_too(monkeypatch: pytest.MonkeyPatch) -> None:
    W = torch.randn(37, 23)
    asked: list[tuple[int, int]] = []

    def tile(start: int, stop: int, dtype: torch.dtype) -> Tensor:
        asked.append((start, stop))
        return W[start:stop].to(dtype)

    monkeypatch.setattr(tiles, "_bridge_bytes", lambda device: 4 * 23 * 2)  # two rows
    ids = torch.tensor([36, 3, 6, 10, 4, 12, 33, 35])
    assert torch.equal(looked_up(ids, tile, (37, 23), torch.float32, budget=4 * 23 * 8), W[ids])
    assert asked == [(3, 7), (10, 13), (33, 37)]
    asked.clear()
    assert torch.equal(looked_up(ids, tile, (37, 23), torch.float32, budget=4 * 23 * 3), W[ids])
    assert asked == [(3, 5), (6, 7), (10, 13), (33, 36), (36, 37)]


@pytest.mark.parametrize("wrong", [-1, 37])
def test_an_id_beyond_the_table_is_refused(wrong: int) -> None:
    with pytest.raises(IndexError, match="expected 0 to 36"):
        looked_up(torch.tensor([3, wrong]), tiles_of(torch.randn(37, 23)), (37, 23), torch.float32)
