"""The format is bitsandbytes' own: the same bytes go in and come out of it."""

import pytest
import torch
from modulora_nf4.quantizer import NF4, Options
from modulora_nf4.reference import LEVELS

functional = pytest.importorskip("bitsandbytes.functional")

SHAPES = [(64, 64), (3, 64), (5, 200), (7, 129), (2, 1), (1, 63), (33, 1000)]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture(autouse=True, scope="module")
def uncompiled():
    """Run the Python code of bitsandbytes as it is: compiling it with g++ takes seconds."""
    with torch.compiler.set_stance("force_eager"):
        yield


def weights(kind, shape):
    w = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    if kind == "outliers":
        w[torch.rand(shape, generator=torch.Generator().manual_seed(1)) < 0.02] *= 1000
    if kind == "zeros":
        w.view(-1)[: max(1, w.numel() // 2)] = 0
    if (
        kind == "ties"
    ):  # every midpoint between two levels, scaled by a power of two so that it stays a tie
        level = torch.tensor(LEVELS)
        values = torch.cat([(level[1:] + level[:-1]) / 2, level]) * 4
        w = values.repeat(-(-w.numel() // values.numel()))[: w.numel()].reshape(shape)
    if kind == "tiny":
        w *= 1e-39
    return w


def theirs(w, block_size, double_quant):
    return functional.quantize_4bit(
        w,
        blocksize=block_size,
        quant_type="nf4",
        compress_statistics=double_quant,
        quant_storage=torch.uint8,
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"{s[0]}x{s[1]}")
@pytest.mark.parametrize("kind", ["normal", "outliers", "zeros", "ties", "tiny"])
def test_codes_and_absmax_equal_bitsandbytes(kind, shape, dtype):
    w = weights(kind, shape).to(dtype)
    packed = NF4().pack(w)
    codes, state = theirs(w, 64, False)
    assert torch.equal(packed.tensors["codes"], codes.view(-1))
    assert torch.equal(packed.tensors["absmax"], state.absmax)


@pytest.mark.parametrize("block_size", [32, 64, 128, 256, 512, 1024, 2048, 4096])
def test_every_block_size_of_bitsandbytes_gives_its_tensors_and_values(block_size):
    w = weights("outliers", (33, 1000))
    quantizer = NF4(Options(block_size=block_size))
    packed = quantizer.pack(w)
    codes, state = theirs(w, block_size, False)
    assert torch.equal(packed.tensors["codes"], codes.view(-1))
    assert torch.equal(packed.tensors["absmax"], state.absmax)
    ours = quantizer.dequantize_tile(packed, (0, 33), torch.float32)
    assert torch.equal(ours, functional.dequantize_4bit(codes, state))


@pytest.mark.parametrize("kind", ["normal", "outliers", "zeros", "constant"])
@pytest.mark.parametrize(
    "shape", [(64, 64), (5, 200), (130, 512), (257, 300), (3, 10)], ids=lambda s: f"{s[0]}x{s[1]}"
)
def test_double_quantization_equals_bitsandbytes(kind, shape):
    w = torch.full(shape, 0.5) if kind == "constant" else weights(kind, shape)
    quantizer = NF4(Options(double_quant=True))
    packed = quantizer.pack(w)
    codes, state = theirs(w, 64, True)
    assert torch.equal(packed.tensors["codes"], codes.view(-1))
    assert torch.equal(packed.tensors["absmax_codes"], state.absmax)
    assert torch.equal(packed.tensors["nested_absmax"], state.state2.absmax)
    assert torch.equal(packed.tensors["offset"], state.offset.reshape(1))
    ours = quantizer.dequantize_tile(packed, (0, shape[0]), torch.float32)
    assert torch.equal(ours, functional.dequantize_4bit(codes, state))


@pytest.mark.parametrize(
    ("shape", "block_size"), [((64, 64), 128), ((128, 48), 64), ((4, 1024), 2048)]
)
def test_blocks_go_on_from_row_to_row(shape, block_size):
    """With AVX-512, bitsandbytes 0.50 misreads its own bytes here: it assumes an absmax per row.

    As one long row, it reads the same bytes as the format defines them.
    """
    w = weights("normal", shape)
    packed = (quantizer := NF4(Options(block_size=block_size))).pack(w)
    codes, state = theirs(w, block_size, False)
    assert torch.equal(packed.tensors["codes"], codes.view(-1))
    state.shape = torch.Size([1, w.numel()])
    ours = quantizer.dequantize_tile(packed, (0, shape[0]), torch.float32)
    assert torch.equal(ours, functional.dequantize_4bit(codes, state).view(shape))
