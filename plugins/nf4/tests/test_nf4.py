"""NF4's kernels give the bits of the reference; weights, options and tensors are refused."""

import pytest
import torch
from modulora_conformance.compiled_kernels import CompiledKernels
from modulora_conformance.fixtures import without_kernels
from modulora_nf4 import reference
from modulora_nf4.quantizer import NF4, Options
from pydantic import ValidationError

SHAPES = [(1, 1), (3, 7), (17, 129), (33, 192), (0, 8), (8, 0)]
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
OPTIONS = [Options(block_size=b, double_quant=d) for b in (1, 2, 64, 1024) for d in (False, True)]

shapes = pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"{s[0]}x{s[1]}")
options = pytest.mark.parametrize(
    "options", OPTIONS, ids=lambda o: f"B{o.block_size}{'-double' if o.double_quant else ''}"
)
compiled = pytest.mark.parametrize("compiled", [True, False], ids=["kernels", "reference"])


@options
@shapes
def test_tiles_have_the_bits_of_the_reference(
    shape, options, by_the_reference, generator, monkeypatch
):
    w = torch.randn(shape, generator=generator)
    w[: shape[0] // 3] = 0
    packed = NF4(options).pack(w)
    W, rows = by_the_reference(packed), (shape[0] // 4, shape[0])
    for dtype in DTYPES:
        tile = NF4(options).dequantize_tile(packed, rows, dtype)
        assert torch.equal(tile, W[slice(*rows)].to(dtype))
    without_kernels(monkeypatch)
    assert torch.equal(NF4(options).dequantize_tile(packed, rows, torch.float32), W[slice(*rows)])


@options
@shapes
def test_packing_gives_the_bytes_of_the_reference(shape, options, generator, monkeypatch):
    magnitudes = torch.logspace(-42, 3, max(1, shape[1]))[: shape[1]]
    w = torch.randn(shape, generator=generator) * magnitudes
    ours = NF4(options).pack(w)
    without_kernels(monkeypatch)
    for key, tensor in NF4(options).pack(w).tensors.items():
        assert torch.equal(tensor, ours.tensors[key]), key


@compiled
def test_constants_with_an_infinite_reciprocal_have_codes(compiled, monkeypatch):
    """Infinity times the zero of a constant that is the mean is NaN, which has no code."""
    if not compiled:
        without_kernels(monkeypatch)
    w = torch.tensor([1.0, 2.0, 3.0]).repeat_interleave(64).reshape(3, 64) * 1e-39
    packed = NF4(Options(double_quant=True)).pack(w)
    assert packed.tensors["nested_absmax"].item() == pytest.approx(1e-39, rel=1e-5)
    assert packed.tensors["absmax_codes"].tolist() == [0, 0, 255]


def test_numbers_beside_a_midpoint_have_the_level_of_the_reference(monkeypatch):
    levels = torch.tensor(reference.LEVELS)
    near = torch.cat([(levels[1:] + levels[:-1]) / 2, torch.tensor([-1.0, 1.0])])
    steps = [near]
    for toward in (-2.0, 2.0):
        for _ in range(3):
            near = near.nextafter(torch.tensor(toward))
            steps.append(near.clamp(-1, 1))
    values = torch.cat([*steps, torch.linspace(-1, 1, 100_001)])
    values = values[: len(values) // 63 * 63].view(-1, 63)
    absmax = torch.tensor([1.0, 3.0, 0.7, 1e-3])[torch.arange(len(values)) % 4, None]
    W = torch.cat([absmax, values * absmax], dim=1)  # each block begins with its largest
    ours = NF4(Options()).pack(W).tensors["codes"]
    without_kernels(monkeypatch)
    assert torch.equal(ours, NF4(Options()).pack(W).tensors["codes"])


@pytest.mark.parametrize("value", [0, 3, 48, -64, 2**31])
def test_a_block_size_that_is_no_power_of_two_is_refused(value):
    with pytest.raises(ValidationError, match=r"expected a power of two from 1 to 2\*\*30"):
        Options(block_size=value)


class TestKernels(CompiledKernels):
    """Mapped files, threads, other processors, no numba."""

    packing_share = 2.5
    instruction_sets = True

    @pytest.fixture
    def quantizers(self):
        options = {}, {"double_quant": True}, {"block_size": 2}, {"block_size": 8}
        return [NF4(Options(**chosen)) for chosen in options]
