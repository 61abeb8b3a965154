"""What the nf4 quantizer promises: ranges, layouts, products, refusals, and the same values from kernels and reference."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from modulora_nf4 import SPEC, packing, reference
from modulora_nf4.quantizer import NF4, Options
from pydantic import ValidationError

from modulora_core import kernels
from modulora_core.errors import CheckpointError, WeightError
from modulora_core.spec import PackedWeight, Quantizer

SHAPES = [(1, 1), (3, 7), (5, 64), (17, 129), (33, 200), (0, 8), (8, 0)]
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
OPTIONS = [Options(block_size=b, double_quant=d) for b in (1, 2, 64, 1024) for d in (False, True)]


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.fixture
def plain_torch(monkeypatch):
    """The path that runs where no kernel can."""
    monkeypatch.setattr(kernels, "load", lambda module, device: None)


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


def name(options: Options) -> str:
    return f"B{options.block_size}{'-double' if options.double_quant else ''}"


@pytest.mark.parametrize("options", OPTIONS, ids=name)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"{s[0]}x{s[1]}")
def test_layout_equals_that_of_a_packed_weight(shape, options, generator):
    quantizer = NF4(options)
    assert quantizer.layout(shape) == quantizer.pack(torch.randn(shape, generator=generator)).layout


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 40), st.integers(0, 300), st.sampled_from(OPTIONS))
def test_layout_is_exact_for_any_shape(out_features, in_features, options):
    quantizer = NF4(options)
    shape = (out_features, in_features)
    assert quantizer.layout(shape) == quantizer.pack(torch.ones(shape)).layout


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=name)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"{s[0]}x{s[1]}")
def test_kernels_dequantize_to_the_bits_of_the_reference(shape, options, dtype, generator):
    w = torch.randn(shape, generator=generator)
    w[: shape[0] // 3] = 0
    packed = NF4(options).pack(w)
    ours = NF4(options).dequantize_tile(packed, (0, shape[0]), dtype)
    assert ours.dtype == dtype
    assert torch.equal(ours, by_the_reference(packed).to(dtype))


@pytest.mark.parametrize("options", OPTIONS, ids=name)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"{s[0]}x{s[1]}")
def test_kernels_pack_to_the_bytes_of_the_reference(shape, options, generator, monkeypatch):
    w = (
        torch.randn(shape, generator=generator)
        * torch.logspace(-42, 3, max(1, shape[1]))[: shape[1]]
    )
    compiled = NF4(options).pack(w)
    monkeypatch.setattr(kernels, "load", lambda module, device: None)
    plain = NF4(options).pack(w)
    for key, tensor in plain.tensors.items():
        assert torch.equal(tensor, compiled.tensors[key]), key


@pytest.mark.parametrize("compiled", [True, False], ids=["kernels", "reference"])
def test_constants_whose_reciprocal_is_infinite_are_quantized_too(compiled, monkeypatch):
    """Of subnormal constants that differ by little: infinity times what is left of one that is their mean is NaN, which has no code."""
    if not compiled:
        monkeypatch.setattr(kernels, "load", lambda module, device: None)
    w = torch.tensor([1.0, 2.0, 3.0]).repeat_interleave(64).reshape(3, 64) * 1e-39
    packed = NF4(Options(double_quant=True)).pack(w)
    assert packed.tensors["nested_absmax"].item() == pytest.approx(1e-39, rel=1e-5)
    assert packed.tensors["absmax_codes"].tolist() == [0, 0, 255]


def test_kernels_find_the_nearest_level_for_every_number_about_a_midpoint_or_the_end_of_a_cell(
    monkeypatch,
):
    """A midpoint is looked up by its cell of [-1, 1]: next to midpoints, the ends of cells and at 1 is where that could go wrong."""
    levels = torch.tensor(reference.LEVELS)
    edges = torch.cat([(levels[1:] + levels[:-1]) / 2, torch.tensor([-1.0, 1.0])])
    steps = [edges]
    for toward in (-2.0, 2.0):
        near = edges
        for _ in range(3):
            near = near.nextafter(torch.tensor(toward))
            steps.append(near.clamp(-1, 1))
    values = torch.cat([torch.cat(steps), torch.linspace(-1, 1, 100_001)])
    values = values[: len(values) // 63 * 63].view(-1, 63)
    absmax = torch.tensor([1.0, 3.0, 0.7, 1e-3])[torch.arange(len(values)) % 4, None]
    W = torch.cat([absmax, values * absmax], dim=1)  # each block begins with its largest
    compiled = NF4(Options()).pack(W).tensors["codes"]
    monkeypatch.setattr(kernels, "load", lambda module, device: None)
    assert torch.equal(compiled, NF4(Options()).pack(W).tensors["codes"])


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_dequantize_tile_equals_rows_of_the_whole(data):
    out_features, in_features = data.draw(st.integers(1, 20)), data.draw(st.integers(1, 150))
    start = data.draw(st.integers(0, out_features))
    stop = data.draw(st.integers(start, out_features))
    quantizer = NF4(data.draw(st.sampled_from(OPTIONS)))
    packed = quantizer.pack(
        torch.randn(out_features, in_features, generator=torch.Generator().manual_seed(0))
    )
    for dtype in DTYPES:
        whole = quantizer.dequantize_tile(packed, (0, out_features), dtype)
        part = quantizer.dequantize_tile(packed, (start, stop), dtype)
        assert torch.equal(part, whole[start:stop])


@pytest.mark.parametrize("options", OPTIONS, ids=name)
def test_without_kernels_any_rows_are_the_same(options, plain_torch, generator):
    quantizer = NF4(options)
    packed = quantizer.pack(torch.randn(9, 131, generator=generator))
    for rows in [(0, 9), (1, 4), (8, 9), (3, 3), (9, 9)]:
        part = quantizer.dequantize_tile(packed, rows, torch.float32)
        assert torch.equal(part, by_the_reference(packed)[slice(*rows)])


def test_a_tile_of_many_rounding_pieces_is_rounded_once(generator):
    quantizer = NF4(Options(double_quant=True))
    packed = quantizer.pack(
        torch.randn(701, 1027, generator=generator)
    )  # 2.7 MiB of fp32, odd rows
    whole = quantizer.dequantize_tile(packed, (0, 701), torch.float32)
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        assert torch.equal(
            quantizer.dequantize_tile(packed, (3, 700), dtype), whole[3:700].to(dtype)
        )


# fp32 sums of n products of any order differ by about sqrt(n) roundings; an output in 16 bits is rounded once more, and where the
# processor multiplies bf16 numbers the weights are too
TOLERANCE = {
    torch.float32: 1e-6,
    torch.float64: 1e-15,
    torch.float16: 2**-11,
    torch.bfloat16: 2**-7,
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [0, 1, 2, 5, 31, 40])
@pytest.mark.parametrize("transpose", [False, True], ids=["forward", "transposed"])
@pytest.mark.parametrize(
    "shape", [(1, 1), (6, 64), (37, 129), (131, 1030), (19, 2113)], ids=lambda s: f"{s[0]}x{s[1]}"
)
def test_matmul_equals_the_product_with_the_reference(shape, transpose, rows, dtype, generator):
    for options in (Options(), Options(double_quant=True, block_size=32)):
        packed = NF4(options).pack(torch.randn(shape, generator=generator))
        W = by_the_reference(packed).double()
        x = torch.randn(rows, shape[0] if transpose else shape[1], generator=generator).to(dtype)
        y = NF4(options).matmul(x, packed, transpose)
        exact = x.double() @ (W if transpose else W.t())
        magnitude = x.double().abs() @ (W if transpose else W.t()).abs()
        assert y.dtype == dtype
        assert y.shape == exact.shape
        error = (
            ((y.double() - exact).abs() / magnitude.clamp(min=1e-30)).max().item() if rows else 0.0
        )
        assert error <= TOLERANCE[dtype], error


@pytest.mark.parametrize(
    "metadata",
    [{"block_size": 32, "double_quant": False}, {"block_size": 64, "double_quant": True}, {"block_size": 64},
     {"block_size": 63, "double_quant": False}, {"block_size": "64 ", "double_quant": False, "more": 1}],
    ids=str,
)  # fmt: skip
def test_tensors_that_do_not_fit_their_metadata_are_refused_before_they_are_read(
    metadata, generator
):
    """If this fails: a checkpoint that was edited makes a kernel read beyond the end of its tensors."""
    packed = NF4().pack(torch.randn(8, 63, generator=generator))
    edited = PackedWeight("nf4", 1, packed.shape, packed.tensors, metadata)
    with pytest.raises(CheckpointError, match="nf4 weight"):
        NF4().dequantize_tile(edited, (0, 8), torch.float32)
    for transpose in (False, True):
        with pytest.raises(CheckpointError, match="nf4 weight"):
            NF4().matmul(torch.ones(1, 8 if transpose else 63), edited, transpose)


def test_a_block_larger_than_the_weight_is_one_short_block(generator):
    w = torch.randn(3, 5, generator=generator)
    packed = NF4(Options(block_size=2**30)).pack(w)
    assert packed.tensors["absmax"].tolist() == [w.abs().max().item()]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("at", [0, 70, 129])  # in whole blocks and in the short last one
@pytest.mark.parametrize("compiled", [True, False], ids=["kernels", "reference"])
def test_nan_and_inf_are_refused(bad, at, compiled, monkeypatch):
    if not compiled:
        monkeypatch.setattr(kernels, "load", lambda module, device: None)
    w = torch.ones(2, 65)
    w.view(-1)[at] = bad
    with pytest.raises(
        WeightError, match=r"nf4: expected finite weights .* got NaN or Inf .* \[2, 65\]"
    ):
        NF4().pack(w)


@pytest.mark.parametrize("value", [0, 3, 48, -64, 2**31])
def test_a_block_size_that_is_no_power_of_two_is_refused(value):
    with pytest.raises(
        ValidationError,
        match=rf"block_size\n.*expected a power of two from 1 to 2\*\*30 .*input_value={value},",
    ):
        Options(block_size=value)


def test_the_quantizer_is_what_its_spec_says():
    assert NF4.spec is SPEC
    assert issubclass(NF4, Quantizer)
    assert SPEC.location == f"{NF4.__module__}:{NF4.__name__}"


def test_bits_per_weight_count_the_scales():
    assert NF4().layout((2048, 2048)).bits_per_weight == 4.5
    assert round(NF4(Options(double_quant=True)).layout((2048, 2048)).bits_per_weight, 3) == 4.127
