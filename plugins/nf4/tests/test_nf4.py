"""NF4's kernels give the bits of the reference; weights, options and tensors are refused."""

from __future__ import annotations

import pytest
import torch
from modulora_conformance.fixtures import without_kernels
from modulora_nf4 import packing, reference
from modulora_nf4.quantizer import NF4, Options
from pydantic import ValidationError

from modulora_core.errors import CheckpointError
from modulora_core.spec import PackedWeight

SHAPES = [(1, 1), (3, 7), (17, 129), (33, 192), (0, 8), (8, 0)]
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
OPTIONS = [Options(block_size=b, double_quant=d) for b in (1, 2, 64, 1024) for d in (False, True)]

shapes = pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"{s[0]}x{s[1]}")
options = pytest.mark.parametrize(
    "options", OPTIONS, ids=lambda o: f"B{o.block_size}{'-double' if o.double_quant else ''}"
)
compiled = pytest.mark.parametrize("compiled", [True, False], ids=["kernels", "reference"])


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def by_the_reference(packed: PackedWeight) -> torch.Tensor:
    """All of Ŵ from reference.py alone, fp32."""
    out_features, in_features = packed.shape
    t, size = packed.tensors, packed.metadata["block_size"]
    if packed.metadata["double_quant"]:
        absmax = reference.double_dequantize(t["absmax_codes"], t["nested_absmax"], t["offset"])
    else:
        absmax = t["absmax"]
    q = packing.unpack(t["codes"], 0, out_features * in_features)
    return reference.dequantize(q, absmax, size).reshape(out_features, in_features)


@options
@shapes
def test_tiles_have_the_bits_of_the_reference(shape, options, generator, monkeypatch):
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


@pytest.mark.parametrize("double_quant", [False, True], ids=["", "double"])
@pytest.mark.parametrize("block_size", [16, 32, 4096])
@pytest.mark.parametrize("shape", [(33, 160), (5, 2080), (9, 48), (4, 1)], ids=str)
def test_a_product_of_one_row_is_close_to_the_reference(shape, block_size, double_quant, generator):
    """Its kernel takes whole vectors of one block; other weights have the kernel of few rows."""
    quantizer = NF4(Options(block_size=block_size, double_quant=double_quant))
    packed = quantizer.pack(torch.randn(shape, generator=generator))
    W, x = by_the_reference(packed).double(), torch.randn(1, shape[1], generator=generator)
    y = quantizer.matmul(x, packed)
    # a weight is rounded once more, and each addition rounds
    bound = (shape[1] + 1) * 2.0**-23 * (x.double().abs() @ W.abs().T)
    assert bool(((y - x.double() @ W.T).abs() <= bound + 1e-30).all())


@pytest.mark.parametrize(
    "metadata",
    [{"block_size": 32, "double_quant": False}, {"block_size": 64, "double_quant": True},
     {"block_size": 64}, {"block_size": 63, "double_quant": False},
     {"block_size": 64, "double_quant": False, "more": 1}],
    ids=str,
)  # fmt: skip
def test_tensors_that_do_not_match_their_metadata_are_refused(metadata, generator):
    """If this fails: an edited checkpoint makes a kernel read beyond the end of its tensors."""
    packed = NF4().pack(torch.randn(8, 63, generator=generator))
    edited = PackedWeight("nf4", 1, packed.shape, packed.tensors, metadata)
    with pytest.raises(CheckpointError, match="nf4 weight"):
        NF4().dequantize_tile(edited, (0, 8), torch.float32)
    for x, transpose in ((torch.ones(1, 63), False), (torch.ones(1, 8), True)):
        with pytest.raises(CheckpointError, match="nf4 weight"):
            NF4().matmul(x, edited, transpose)


def test_both_kinds_of_block_constants_are_refused_before_a_weight_is_read(generator):
    quantizer = NF4(Options(double_quant=True))
    packed = quantizer.pack(torch.randn(8, 64, generator=generator))
    tensors = {**packed.tensors, "absmax": torch.ones(1)}
    crafted = PackedWeight("nf4", 1, packed.shape, tensors, packed.metadata)
    with pytest.raises(CheckpointError, match=r"expected absmax as none, got float32 \[1\]"):
        quantizer.check_format(crafted.layout)


def test_a_block_larger_than_the_weight_is_one_short_block(generator):
    w = torch.randn(3, 5, generator=generator)
    packed = NF4(Options(block_size=2**30)).pack(w)
    assert packed.tensors["absmax"].tolist() == [w.abs().max().item()]


@pytest.mark.parametrize("value", [0, 3, 48, -64, 2**31])
def test_a_block_size_that_is_no_power_of_two_is_refused(value):
    with pytest.raises(ValidationError, match=r"expected a power of two from 1 to 2\*\*30"):
        Options(block_size=value)
