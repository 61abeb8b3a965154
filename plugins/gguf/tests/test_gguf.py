"""Tiles have the bits of the gguf package for every type, and five types are packed as there."""

import numpy as np
import pytest
import torch
from gguf.constants import GGMLQuantizationType
from modulora_conformance.fixtures import without_kernels
from modulora_gguf import packing, reference
from modulora_gguf.kernels import cpu
from modulora_gguf.quantizer import GGUF, Options

from modulora_core.errors import ShapeError, WeightError

gguf = pytest.importorskip("gguf.quants")

AS_GGUF = ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "BF16", "TQ1_0", "TQ2_0", "MXFP4"]
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]

types = pytest.mark.parametrize("kind", reference.DEQUANTIZE)


def packed_of(blocks, kind):
    weights, nbytes = reference.block_of(kind)
    shape = (len(blocks), blocks.shape[1] // nbytes * weights)
    layout, tensors = GGUF(Options(type=kind)).layout(shape), {"blocks": torch.from_numpy(blocks)}
    scale = {"scale": torch.ones(1)} if kind == reference.SCALED else {}
    return layout.fill(tensors | scale)


def by_gguf(blocks, kind):
    with np.errstate(all="ignore"):
        return torch.from_numpy(gguf.dequantize(blocks, GGMLQuantizationType[kind]))


@types
def test_tiles_of_any_bytes_have_the_bits_of_gguf(kind, monkeypatch):
    generator = np.random.default_rng(0)
    blocks = generator.integers(0, 256, (37, 5 * reference.block_of(kind)[1]), dtype=np.uint8)
    W, packed = by_gguf(blocks, kind), packed_of(blocks, kind)
    # a scale that isn't finite is read as 0, and there as NaN or Inf
    usable = W.isfinite() & (W.abs() < 2.0**100) if kind != "BF16" else ~W.isnan()
    for patched in (False, True):
        if patched:
            without_kernels(monkeypatch)
        for rows in ((0, 37), (3, 20), (36, 37), (9, 9)):
            tile = GGUF().dequantize_tile(packed, rows, torch.float32)
            of_rows = slice(*rows)
            expected = W[of_rows]
            assert torch.equal(tile[usable[of_rows]], expected[usable[of_rows]]), rows
        one = packed_of(blocks.reshape(37 * 5, -1), kind)  # one block a row
        tile = GGUF().dequantize_tile(one, (7, 8), torch.float32)[0]
        expected, is_usable = (each.reshape(37 * 5, -1)[7] for each in (W, usable))
        assert torch.equal(tile[is_usable], expected[is_usable])
    assert usable.float().mean() > 0.8


@pytest.mark.parametrize("kind", AS_GGUF)
def test_tiles_of_quantized_values_have_the_bits_of_gguf(kind):
    weight = torch.randn(19, 512, generator=torch.Generator().manual_seed(0))
    blocks = gguf.quantize(weight.numpy(), GGMLQuantizationType[kind]).view(np.uint8)
    W, packed = by_gguf(blocks, kind), packed_of(blocks.reshape(19, -1), kind)
    for dtype in DTYPES:
        tile = GGUF().dequantize_tile(packed, (2, 18), dtype)
        assert torch.equal(tile, W[2:18].to(dtype))
    if kind in packing.QUANTIZE:
        weight[3], weight[5, :32], weight[5, 7] = 0, -1, 1
        weight *= torch.logspace(-3, 3, 19)[:, None]
        expected = gguf.quantize(weight.numpy(), GGMLQuantizationType[kind])
        ours = GGUF(Options(type=kind)).pack(weight).tensors["blocks"]
        assert torch.equal(ours, torch.from_numpy(expected))


@pytest.mark.parametrize("kind", sorted(cpu.KINDS))
def test_products_and_lookups_use_the_values_of_the_tiles(kind):
    generator = np.random.default_rng(1)
    weights, nbytes = reference.block_of(kind)
    blocks = generator.integers(0, 255, (33, 2304 // weights * nbytes), dtype=np.uint8)
    if kind in packing.QUANTIZE:  # others have random scales, which are large
        W = torch.randn(33, 2304, generator=torch.Generator().manual_seed(2))
        blocks = GGUF(Options(type=kind)).pack(W).tensors["blocks"].numpy()
    packed = packed_of(blocks, kind)
    W = reference.dequantize(packed.tensors["blocks"], kind).double()
    for n, transpose in ((1, False), (5, False), (5, True), (100, False)):
        x = torch.randn(n, 33 if transpose else 2304)
        M = W if transpose else W.T
        y = GGUF().matmul(x, packed, transpose)
        bound = 2304 * 2.0**-23 * (x.double().abs() @ M.abs())
        assert bool(((y - x.double() @ M).abs() <= bound).all())
    ids = torch.tensor([[3, 32], [0, 3]])
    assert torch.equal(GGUF().lookup(ids, packed, torch.float32), W.float()[ids])


def of_llama_cpp(x):
    """Ŵ of parts of 32 by the search that ggml publishes for Q4_K (``make_qkx2_quants``, MIT).

    Without calibration it weights errors by |x| and the root of the mean square.
    """
    w = x.square().mean(1, keepdim=True).sqrt() + x.abs()
    low, high = x.amin(1, keepdim=True).clamp(max=0), x.amax(1, keepdim=True)
    best, error = torch.empty_like(x), torch.full_like(low, torch.inf)
    for step in range(-1, 21):
        inverse = 15 / (high - low) if step < 0 else (14 + 0.1 * step) / (high - low)
        q = (inverse * (x - low)).round().clamp(0, 15)
        a, b, c = (w * q * q).sum(1), (w * q).sum(1), w.sum(1)
        d, e = (w * q * x).sum(1), (w * x).sum(1)
        s, m = (c * d - b * e) / (a * c - b * b), (a * e - b * d) / (a * c - b * b)
        s, m = torch.where(m > 0, d / a, s), m.clamp(max=0)
        values = s[:, None] * q + m[:, None]
        found = (w * (values - x).square()).sum(1, keepdim=True)
        best, error = torch.where(found < error, values, best), torch.minimum(found, error)
    return best


def test_q4_k_is_not_worse_than_llama_cpps_search():
    """Its scales aren't even rounded to 6 bits here, as ours are."""
    W = torch.randn(64, 1024, generator=torch.Generator().manual_seed(3))
    packed = GGUF(Options(type="Q4_K")).pack(W)
    ours = GGUF().dequantize_tile(packed, (0, 64), torch.float32)
    theirs = of_llama_cpp(W.view(-1, 32)).view(64, 1024)
    assert (ours - W).norm() <= 1.01 * (theirs - W).norm()


def test_equal_weights_below_zero_are_kept():
    W = torch.full((2, 256), -0.3)
    quantizer = GGUF(Options(type="Q4_K"))
    found = quantizer.dequantize_tile(quantizer.pack(W), (0, 2), torch.float32)
    assert torch.allclose(found, W, rtol=2e-3)


def test_requests_are_refused():
    with pytest.raises(ShapeError, match="type Q4_K: in_features 576 is not a multiple of 256"):
        GGUF(Options(type="Q4_K")).check_shape((8, 576))
    with pytest.raises(ShapeError, match="got IQ2_S, which is only read"):
        GGUF(Options(type="IQ2_S")).check_shape((8, 512))
    for value in (torch.nan, torch.inf, 1e6, 1e-7):
        with pytest.raises(WeightError, match="expected finite weights with a largest magnitude"):
            GGUF().pack(torch.full((2, 32), value))
