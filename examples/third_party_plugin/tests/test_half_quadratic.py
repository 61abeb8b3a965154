"""Kernels against the reference, odd shapes, and refusals. The conformance kit checks the rest."""

import pytest
import torch
from modulora_half_quadratic import quantizer as module
from modulora_half_quadratic.quantizer import HalfQuadratic, Options

OPTIONS = [Options(bits=bits, group_size=64 if bits % 2 else 24) for bits in range(1, 9)]
ODD = [(1, 1), (5, 64), (17, 129), (33, 2200), (0, 8), (8, 0)]


def packed_of(options, shape):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    return HalfQuadratic(options), HalfQuadratic(options).pack(weight)


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: f"{options.bits} bits")
def test_kernels_give_the_bits_of_the_reference(options, by_the_reference):
    for shape in ODD:
        quantizer, packed = packed_of(options.model_copy(update={"iterations": 1}), shape)
        W = by_the_reference(packed)
        for dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16):
            tile = quantizer.dequantize_tile(packed, (0, shape[0]), dtype)
            assert torch.equal(tile, W.to(dtype)), (shape, dtype)
        for transpose, M in ((False, W.T), (True, W)):
            x = torch.randn(3, len(M), generator=torch.Generator().manual_seed(1))
            y, exact = quantizer.matmul(x, packed, transpose).double(), x.double() @ M.double()
            scale = x.double().abs() @ M.double().abs()
            assert bool(((y - exact).abs() <= 1e-6 * scale).all()), (shape, transpose)


@pytest.mark.parametrize("nbytes", [1, 4096])
def test_packed_bytes_do_not_depend_on_how_much_is_quantized_at_once(nbytes, monkeypatch):
    _, usual = packed_of(Options(), (70, 100))
    monkeypatch.setattr(module, "PACKED_AT_ONCE", nbytes)
    _, parts = packed_of(Options(), (70, 100))
    for name, tensor in parts.tensors.items():
        assert torch.equal(tensor, usual.tensors[name])
