"""The tiled product equals the dense product in both directions, within its budget."""

from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from modulora_core import dense_products
from modulora_core.errors import OptionError
from modulora_core.tiles import (
    CPU_TILE_BYTES,
    looked_up,
    tile_budget,
    tile_bytes,
    tile_ranges,
    tiled_matmul,
)

CPU = torch.device("cpu")


def rows_of(W, start, stop, dtype):
    return W[start:stop].to(dtype)


@given(st.integers(0, 1000), st.integers(1, 10**5))
def test_ranges_partition_the_rows_within_the_budget(rows, budget):
    ranges = list(tile_ranges(rows, 40, budget))
    assert [i for start, stop in ranges for i in range(start, stop)] == list(range(rows))
    assert all((stop - start) * 40 <= budget or stop - start == 1 for start, stop in ranges)


def test_the_budget_is_the_blocks_then_the_environments_then_the_default(monkeypatch):
    monkeypatch.delenv("MODULORA_TILE_BYTES", raising=False)
    assert tile_bytes(CPU) == CPU_TILE_BYTES
    monkeypatch.setenv("MODULORA_TILE_BYTES", "12345")
    assert tile_bytes(CPU) == 12345
    with tile_budget(99):
        with tile_budget(98):
            assert tile_bytes(CPU) == 98
        assert tile_bytes(CPU) == 99
        with ThreadPoolExecutor(1) as backward:  # on a GPU autograd has threads of its own
            assert backward.submit(tile_bytes, CPU).result() == 99
    assert tile_bytes(CPU) == 12345


@pytest.mark.parametrize("text", ["0", "-1", "4MiB", ""])
def test_a_budget_that_is_not_positive_is_refused(text, monkeypatch):
    monkeypatch.setenv("MODULORA_TILE_BYTES", text)
    with pytest.raises(OptionError, match="MODULORA_TILE_BYTES"):
        tile_bytes(CPU)
    with pytest.raises(OptionError, match="tile budget"), tile_budget(0):
        pass


@given(
    st.sampled_from([(37, 23), (1, 5), (0, 4), (4, 0)]),
    st.sampled_from([(), (1,), (0,), (3, 5), (2, 0, 3)]),
    st.sampled_from([1, 1000, 10**9]),
    st.booleans(),
)
def test_the_product_equals_the_dense_product(shape, leading, budget, transpose):
    generator = torch.Generator().manual_seed(0)
    W = torch.randn(shape, dtype=torch.float64, generator=generator)
    given, wanted = shape if transpose else reversed(shape)
    x = torch.randn(*leading, given, dtype=torch.float64, generator=generator)
    with tile_budget(budget):
        y = tiled_matmul(x, partial(rows_of, W), shape, transpose)
    assert y.shape == (*leading, wanted)
    torch.testing.assert_close(y, x @ W if transpose else x @ W.t(), rtol=1e-12, atol=1e-12)


@pytest.fixture(params=[False, True], ids=["no-bf16-units", "bf16-units"])
def units(request, monkeypatch):
    """Whether the processor is taken for one with bf16 units; torch multiplies bf16 either way."""
    monkeypatch.setattr(dense_products, "has_bfloat16_units", lambda: request.param)
    return bool(request.param)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("transpose", [False, True], ids=["forward", "transposed"])
def test_sixteen_bit_inputs_are_summed_in_fp32_and_rounded_once(dtype, transpose, units):
    torch.manual_seed(0)
    W = torch.randn(300, 200).to(dtype)
    x = torch.randn(9, 300 if transpose else 200).to(dtype)
    with tile_budget(10_000):
        y = tiled_matmul(x, partial(rows_of, W), (300, 200), transpose)
    exact = x.double() @ (W.double() if transpose else W.double().t())

    def rounding(product):
        """Half an ulp of a 16-bit result."""
        smallest = torch.finfo(dtype).smallest_normal
        return 0.51 * torch.finfo(dtype).eps * product.abs().clamp_min(smallest)

    allowed = rounding(exact) + 1e-4  # the fp32 sums round too
    if transpose and units and dtype == torch.bfloat16:  # torch rounds each tile's product
        for start, stop in tile_ranges(300, 200 * 2, 10_000):
            allowed += rounding(x[:, start:stop].double() @ W[start:stop].double())
    assert y.dtype == dtype
    assert ((y.double() - exact).abs() <= allowed).all()


def test_tiles_have_the_dtype_that_the_cpu_multiplies_fast(units):
    asked = []

    def tile(start, stop, dtype):
        asked.append(dtype)
        return torch.ones(stop - start, 8, dtype=dtype)

    dtypes = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
    for dtype in dtypes:
        assert tiled_matmul(torch.ones(2, 8, dtype=dtype), tile, (8, 8)).dtype == dtype
    wide = torch.bfloat16 if units else torch.float32
    assert asked == [wide, torch.float32, torch.float32, torch.float64]


@pytest.mark.parametrize("transpose", [False, True])
def test_a_product_on_the_meta_device_has_its_shape_and_dtype(transpose):
    def tile(start, stop, dtype):
        return torch.empty(stop - start, 5, dtype=dtype, device="meta")

    x = torch.empty(2, 3, 4 if transpose else 5, dtype=torch.bfloat16, device="meta")
    y = tiled_matmul(x, tile, (4, 5), transpose)
    assert (y.device.type, y.dtype) == ("meta", torch.bfloat16)
    assert y.shape == (2, 3, 5 if transpose else 4)


@pytest.mark.parametrize("budget", [1, 200, 10**9])
@pytest.mark.parametrize("shape", [(), (0,), (9,), (3, 4)], ids=str)
def test_looked_up_rows_equal_rows_of_the_whole(shape, budget):
    W = torch.randn(37, 23, generator=torch.Generator().manual_seed(0))
    ids = torch.randint(0, 37, shape, generator=torch.Generator().manual_seed(1))
    with tile_budget(budget):
        found = looked_up(ids, partial(rows_of, W), (37, 23), torch.bfloat16)
    assert torch.equal(found, W.bfloat16()[ids])


def test_a_row_is_decoded_once_and_neighbours_together_within_the_budget():
    W = torch.randn(37, 23)
    asked = []

    def tile(start, stop, dtype):
        asked.append((start, stop))
        return W[start:stop].to(dtype)

    ids = torch.tensor([[36, 4, 5], [4, 8, 6], [0, 36, 7]])
    with tile_budget(4 * 23 * 3):
        assert torch.equal(looked_up(ids, tile, (37, 23), torch.float32), W[ids])
    assert asked == [(0, 1), (4, 7), (7, 9), (36, 37)]
