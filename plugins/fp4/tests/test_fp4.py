"""Tiles have the bits of other tools, packing follows the rule, and bad weights are refused."""

import numpy as np
import pytest
import torch
from modulora_conformance.compiled_kernels import CompiledKernels
from modulora_conformance.fixtures import without_kernels
from modulora_fp4 import packing, reference
from modulora_fp4.quantizer import FP4, Options

from modulora_core.errors import CheckpointError, ShapeError, WeightError
from modulora_core.spec import Calibration, PackedWeight

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
kinds = pytest.mark.parametrize("kind", ["mxfp4", "nvfp4"])


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


def any_bytes(kind, rows, columns, generator):
    """Codes and scales of all values; scales that aren't numbers are left out."""
    packed = FP4(Options(type=kind)).layout((rows, columns)).empty("cpu")
    for name in ("codes", "scales"):
        tensor = packed.tensors[name]
        tensor.copy_(torch.randint(0, 256, tensor.shape, generator=generator))
    scales = packed.tensors["scales"]
    scales[(scales == 127) | (scales == 255) if kind == "nvfp4" else scales > 227] = 3
    if kind == "nvfp4":
        packed.tensors["global_scale"].fill_(37.7)
    return packed


def tile(packed, dtype=torch.float32):
    return FP4().dequantize_tile(packed, (0, packed.shape[0]), dtype)


@kinds
@pytest.mark.parametrize("shape", [(1, 32), (3, 96), (9, 576), (5, 2112), (0, 32)], ids=str)
def test_tiles_have_the_bits_of_the_reference(shape, kind, generator, monkeypatch):
    packed = any_bytes(kind, *shape, generator)
    W, rows = reference.dequantize(kind, *packed.tensors.values()), (shape[0] // 4, shape[0])
    for dtype in DTYPES:
        found = FP4().dequantize_tile(packed, rows, dtype)
        assert torch.equal(found, W[slice(*rows)].to(dtype))
    without_kernels(monkeypatch)
    assert torch.equal(FP4().dequantize_tile(packed, rows, torch.float32), W[slice(*rows)])


def test_mxfp4_has_the_bits_of_transformers(generator):
    """Their decoder multiplies by powers of two in bf16, which is exact."""
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    packed = any_bytes("mxfp4", 24, 96, generator)
    blocks, scales = (
        packed.tensors["codes"].view(1, 24, 3, 16),
        packed.tensors["scales"].view(1, 24, 3),
    )
    theirs = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)  # [1, in, out]
    assert torch.equal(tile(packed), theirs[0].t())


@kinds
def test_tiles_have_the_bits_of_gguf(kind, generator):
    """Its blocks have other orders: 16 low halves first, or 8; and NVFP4 has no global scale."""
    quants = pytest.importorskip("gguf.quants")
    from gguf.constants import GGMLQuantizationType

    packed = any_bytes(kind, 7, 192, generator)
    size, run = reference.BLOCK[kind], 16 if kind == "mxfp4" else 8
    codes = reference.unpack(packed.tensors["codes"]).view(-1, 2, run)
    stored = (codes[:, 0] | codes[:, 1] << 4).view(7, -1, size // 2)
    scales = packed.tensors["scales"]
    if kind == "nvfp4":
        scales &= 127  # it takes scales without a sign, four blocks together
        packed.tensors["global_scale"].fill_(1)
        parts = scales.view(7, -1, 4), stored.reshape(7, -1, 32)
    else:
        parts = scales[..., None], stored
    blocks = torch.cat(parts, dim=-1).flatten(1)
    with np.errstate(all="ignore"):
        theirs = quants.dequantize(blocks.numpy(), GGMLQuantizationType[kind.upper()])
    usable = torch.from_numpy(theirs).abs() < 2.0**100
    assert torch.equal(tile(packed)[usable], torch.from_numpy(theirs)[usable])
    assert usable.float().mean() > 0.8


def test_elements_are_rounded_to_nearest_and_halves_to_even_fractions():
    levels = torch.tensor(reference.LEVELS[:8])
    midpoints = (levels[1:] + levels[:-1]) / 2
    assert packing.rounded(midpoints).tolist() == [0, 1, 1, 2, 2, 4, 4]
    y = torch.linspace(-7, 7, 10_001).double()
    nearest = (y[:, None].abs() - levels.double()).abs().amin(1)
    found = packing.rounded(y.float())
    assert torch.equal((found.double() - y.clamp(-6, 6)).abs() <= nearest + 1e-6, y == y)
    codes = packing.codes_of(found)
    assert torch.equal(torch.tensor(reference.LEVELS)[codes.int()], found)


@kinds
def test_no_block_is_worse_than_by_the_rule(kind, generator):
    size = reference.BLOCK[kind]
    W = torch.randn(64, 512, generator=generator) * torch.logspace(-6, 3, 64)[:, None]
    W[3], W[5, :64], W[7, 100:200] = 0, 1e-38, W[7, 0]
    packed = FP4(Options(type=kind)).pack(W)
    g = packed.tensors.get("global_scale")
    blocks = W.view(64, -1, size)
    X = reference.block_scales(kind, packing.rule(blocks.abs().amax(2), g), g)[..., None]
    plain = packing.rounded(blocks / X.clamp(min=2.0**-127)) * X
    errors = [(values - blocks).square().sum(2) for values in (tile(packed).view_as(blocks), plain)]
    assert bool((errors[0] <= errors[1]).all())
    assert float(errors[0].sum()) < 0.99 * float(errors[1].sum())
    assert not tile(packed)[3].any()


@kinds
def test_damaged_scales_are_read_as_zero(kind, generator):
    packed = any_bytes(kind, 2, 64, generator)
    packed.tensors["scales"].fill_(255)
    assert not tile(packed).any()
    if kind == "nvfp4":
        packed.tensors["scales"].fill_(60)
        packed.tensors["global_scale"].zero_()
        assert not tile(packed).any()


def test_requests_are_refused():
    with pytest.raises(ShapeError, match="type mxfp4: in_features 48 is not a multiple of 32"):
        FP4().check_shape((8, 48))
    for value in (torch.nan, torch.inf, 1e31):
        with pytest.raises(WeightError, match="expected finite weights below"):
            FP4().pack(torch.full((2, 32), value))
    packed = FP4().pack(torch.ones(4, 64))
    edited = PackedWeight("fp4", 1, packed.shape, packed.tensors, {"type": "nvfp4"})
    with pytest.raises(CheckpointError, match=r"expected scales as uint8 \[4, 4\]"):
        FP4().dequantize_tile(edited, (0, 4), torch.float32)


@kinds
def test_packing_gives_the_bytes_of_the_reference(kind, generator, monkeypatch):
    W = torch.randn(48, 512, generator=generator) * torch.logspace(-38, 28, 48)[:, None]
    W[3], W[5, :64], W[7] = 0, 1e-38, torch.tensor(reference.LEVELS).repeat(32)
    W[40:] = torch.randn(8, 512, generator=generator)
    scale = torch.logspace(-1, 1, 512)
    for calibration in (None, Calibration(torch.diag(scale), 8)):
        for weight in (W, W[40:]):
            ours = FP4(Options(type=kind)).pack(weight, calibration)
            with monkeypatch.context() as patched:
                without_kernels(patched)
                plain = FP4(Options(type=kind)).pack(weight, calibration)
            for name, tensor in plain.tensors.items():
                assert torch.equal(tensor, ours.tensors[name]), name


class TestKernels(CompiledKernels):
    """Mapped files, threads, other processors, no numba."""

    packing_share = 1.5
    instruction_sets = ("avx2",)  # the core and nf4 compare code without AVX2
    loops_of_core = True

    @pytest.fixture
    def quantizers(self):
        return [FP4(Options(type=kind)) for kind in ("mxfp4", "nvfp4")]
