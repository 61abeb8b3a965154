"""Eight bits a value and a scale a block: beside the definition in fp64, and the kernel beside the plain torch that it stands for."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from modulora_core import kernels
from modulora_core.blockwise import BLOCK, Blockwise

SHAPES = [(3, 5, 2 * BLOCK), (7, BLOCK - 1), (33, BLOCK + 1), (1, 1), (0, 40), (BLOCK,), (300, 576)]


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "load", lambda *_: None)


def numbers(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    """Some channels are a hundred times as large as others, as in a transformer."""
    generator = torch.Generator().manual_seed(len(shape))
    x = torch.randn(shape, generator=generator) * torch.where(
        torch.rand(shape[-1:], generator=generator) < 0.02, 100.0, 1.0
    )
    return x.to(dtype)


def by_definition(x: Tensor) -> Tensor:
    """A loop over blocks, in fp64."""
    out = []
    for row in x.double().reshape(-1, x.shape[-1]):
        for block in row.split(BLOCK):
            s = block.abs().max() / 127
            out.append((block / s).round() * s if s > 0 else torch.zeros_like(block))
    return torch.cat(out).view(x.shape) if out else x.double()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_are_rounded_to_127_steps_of_their_blocks_largest(shape: tuple[int, ...], plain: None) -> None:
    x = numbers(shape)
    found = Blockwise.quantize(x).dequantize()
    assert found.shape == x.shape
    assert found.dtype == x.dtype
    torch.testing.assert_close(found.double(), by_definition(x), rtol=1e-6, atol=0)


def test_it_takes_a_byte_a_value_and_four_a_block() -> None:
    coded = Blockwise.quantize(torch.randn(6, 300))
    assert (coded.codes.dtype, coded.codes.shape) == (torch.int8, (6, 300))
    assert (coded.scales.dtype, coded.scales.shape) == (torch.float32, (6, 3))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_other_dtypes_are_rounded_once(dtype: torch.dtype, plain: None) -> None:
    x = numbers((9, 200), dtype)
    found = Blockwise.quantize(x).dequantize()
    assert found.dtype == dtype
    # half a step of the dtype, and what fp32 makes of the scale
    torch.testing.assert_close(
        found.double(),
        by_definition(x),
        rtol=0.5 * torch.finfo(dtype).eps + 2**-22 * (dtype != torch.float64),
        atol=0,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_kernel_gives_the_bits_of_plain_torch(
    shape: tuple[int, ...], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("numba", reason="the kernel is numba's")
    x = numbers(shape, dtype)
    by_kernel = Blockwise.quantize(x)
    back = by_kernel.dequantize()
    monkeypatch.setattr(kernels, "load", lambda *_: None)
    expected = Blockwise.quantize(x)
    assert torch.equal(by_kernel.codes, expected.codes)
    assert torch.equal(by_kernel.scales, expected.scales)
    assert torch.equal(back, expected.dequantize())


@pytest.mark.parametrize("kernel", [True, False], ids=["kernel", "torch"])
def test_what_isnt_finite_makes_its_block_nan_and_no_other(
    kernel: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not kernel:
        monkeypatch.setattr(kernels, "load", lambda *_: None)
    for value in (float("nan"), float("inf"), -float("inf")):
        x = torch.ones(2, 3 * BLOCK)
        x[1, BLOCK + 3] = value
        found = Blockwise.quantize(x).dequantize()
        # an infinity's own code is 0, and 0 times it isn't a number
        assert found[1, BLOCK : 2 * BLOCK].isnan().all()
        found[1, BLOCK : 2 * BLOCK] = 1
        assert torch.equal(found, torch.ones_like(x))


@pytest.mark.parametrize("kernel", [True, False], ids=["kernel", "torch"])
def test_zeros_and_the_smallest_numbers_become_zeros(kernel: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not kernel:
        monkeypatch.setattr(kernels, "load", lambda *_: None)
    for value in (0.0, 1e-45, 1e-38, 1e-37):
        assert torch.equal(Blockwise.quantize(torch.full((2, 40), value)).dequantize(), torch.zeros(2, 40))
    assert Blockwise.quantize(torch.full((2, 40), 1e-35)).dequantize().min() > 0.99e-35


def test_strides_make_no_difference_and_a_graph_is_left_out() -> None:
    x = numbers((40, 64)).requires_grad_()
    turned = Blockwise.quantize(x.t())
    assert torch.equal(turned.dequantize(), Blockwise.quantize(x.detach().t().contiguous()).dequantize())
    assert not turned.dequantize().requires_grad
