"""Which inputs a kernel for few rows takes, and as what; numba isn't needed."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from modulora_core import kernels
from modulora_core.devices import dense_products
from modulora_core.kernels import choices


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_few_rows_are_contiguous_of_the_same_values(dtype: torch.dtype) -> None:
    x = torch.randn(6, 2, 4, dtype=dtype, requires_grad=True).transpose(0, 2)  # [4, 2, 6]
    few = kernels.few_rows(x, 6, 32)
    assert few is not None
    assert few.is_contiguous()
    assert not few.requires_grad
    assert torch.equal(few, x.detach().to(few.dtype))
    assert kernels.rows_of(few).shape == (8, 6)
    assert kernels.rows_of(few[..., :0].contiguous()).shape == (8, 0)


@pytest.mark.parametrize(
    "x",
    [torch.ones(9, 6), torch.ones(2, 6, dtype=torch.float64), torch.ones(2, 5), torch.ones(0, 6),
     torch.ones(()), torch.ones(2, 6, device="meta")],
    ids=["too many rows", "fp64", "another last dimension", "no rows", "a scalar", "another device"],
)  # fmt: skip
def test_what_a_few_row_kernel_can_not_take_goes_to_tiles(x: Tensor) -> None:
    assert kernels.few_rows(x, 6, 8) is None


@pytest.mark.parametrize("units", [True, False])
def test_enough_rows_of_bf16_stay_bf16_where_the_processor_multiplies_it(
    units: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dense_products, "has_bfloat16_units", lambda: units)
    monkeypatch.setattr(dense_products, "has_bfloat16_tile_units", lambda: False)
    x = torch.randn(choices.BF16_ROWS, 6)
    cases = [
        (x.bfloat16(), None, units),
        (x.bfloat16(), torch.float32, False),  # made of fp32
        (x, torch.bfloat16, units),
        (x, None, False),
        (x.half(), None, False),
        (x[1:].bfloat16(), None, False),  # too few
    ]
    for given, dtype, stays in cases:
        few = kernels.few_rows(given, 6, 8, dtype)
        assert few is not None
        assert few.dtype == (torch.bfloat16 if stays else torch.float32)
        assert torch.equal(few, given.to(few.dtype))


def test_with_amx_few_rows_of_bf16_are_fewer_and_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dense_products, "has_bfloat16_units", lambda: True)
    monkeypatch.setattr(dense_products, "has_bfloat16_tile_units", lambda: True)
    most = choices.ROWS_BEFORE_AMX
    x = torch.randn(most + 1, 6)
    for given, dtype in ((x.bfloat16(), None), (x, torch.bfloat16)):
        few = kernels.few_rows(given[1:], 6, 64, dtype)
        assert few is not None
        assert few.dtype == torch.float32
        assert kernels.few_rows(given, 6, 64, dtype) is None
        more = kernels.few_rows(given, 6, 64, dtype, by_amx=True)
        assert more is not None
        assert torch.equal(more, given.bfloat16())
    assert kernels.few_rows(x, 6, 64) is not None
    many = torch.randn(choices.ROWS_OF_AMX + 1, 6).bfloat16()
    assert kernels.few_rows(many[1:], 6, 10**6, by_amx=True) is not None
    assert kernels.few_rows(many, 6, 10**6, by_amx=True) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("leading", [(), (3,), (2, 3)], ids=str)
def test_a_product_gets_the_shape_and_the_dtype_of_its_input(
    leading: tuple[int, ...], dtype: torch.dtype
) -> None:
    x = torch.randn(*leading, 6, dtype=dtype)
    y = kernels.room_for(x, 4)
    kernels.rows_of(y)[:] = torch.randn(max(1, x.numel() // 6), 4).numpy()  # on the same memory
    like = kernels.like_input(torch.from_numpy(y), x)
    assert like.shape == (*leading, 4)
    assert torch.equal(like, torch.from_numpy(y).to(dtype))
