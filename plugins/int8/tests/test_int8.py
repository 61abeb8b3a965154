"""INT8's kernels give the bits of the reference; weights, options and tensors are refused."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from modulora_conformance.compiled_kernels import CompiledKernels
from modulora_conformance.fixtures import without_kernels
from modulora_int8 import reference
from modulora_int8.quantizer import INT8, Options

SHAPES = [(1, 1), (3, 7), (17, 129), (33, 200), (0, 8), (8, 0)]
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
OPTIONS = [Options(group_size=g) for g in (None, 2, 48, 64, 1000)]

shapes = pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"{s[0]}x{s[1]}")
options = pytest.mark.parametrize("options", OPTIONS, ids=lambda o: f"G{o.group_size}")


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


def by_the_reference(packed):
    """All of Ŵ from reference.py alone, fp32."""
    t = packed.tensors
    return reference.dequantize(t["codes"], t["scales"], packed.metadata["group_size"])


@options
@shapes
def test_tiles_have_the_bits_of_the_reference(shape, options, generator, monkeypatch):
    w = torch.randn(shape, generator=generator)
    w[: shape[0] // 3] = 0
    packed = INT8(options).pack(w)
    W, rows = by_the_reference(packed), (shape[0] // 4, shape[0])
    for dtype in DTYPES:
        tile = INT8(options).dequantize_tile(packed, rows, dtype)
        assert torch.equal(tile, W[slice(*rows)].to(dtype))
    without_kernels(monkeypatch)
    assert torch.equal(INT8(options).dequantize_tile(packed, rows, torch.float32), W[slice(*rows)])


@options
@shapes
def test_packing_gives_the_bytes_of_the_reference(shape, options, generator, monkeypatch):
    rows = torch.logspace(-30, 5, max(1, shape[0]))[: shape[0], None]
    w = torch.randn(shape, generator=generator) * rows
    w[shape[0] // 2 :] *= torch.logspace(-5, 0, max(1, shape[1]))[: shape[1]]
    for dtype in DTYPES:
        W = w.clamp(-65504, 65504).to(dtype)
        with monkeypatch.context() as patch:
            ours = INT8(options).pack(W)
            without_kernels(patch)
            plain = INT8(options).pack(W)
        assert torch.equal(plain.tensors["codes"], ours.tensors["codes"])
        assert torch.equal(plain.tensors["scales"], ours.tensors["scales"])


@given(st.lists(st.floats(-70000, 70000, width=32), min_size=1, max_size=40))
def test_rounding_to_fp16_has_the_bits_of_the_reference_for_any_values(values):
    W = torch.tensor([values])
    packed = INT8().pack(W)
    codes, scales = reference.quantize(W)
    assert torch.equal(packed.tensors["codes"], codes)
    assert torch.equal(packed.tensors["scales"], scales)


class TestKernels(CompiledKernels):
    """Mapped files, threads, other processors, no numba."""

    packing_share = 2.5

    @pytest.fixture
    def quantizers(self):
        return [INT8(Options(group_size=group_size)) for group_size in (None, 48)]
