"""What the quantizer promises: layouts, ranges, refusals, and the same values from kernels and reference."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from modulora_half_quadratic import SPEC
from modulora_half_quadratic import quantizer as module
from modulora_half_quadratic.quantizer import HalfQuadratic, Options
from pydantic import ValidationError

from modulora_core import kernels
from modulora_core.errors import CheckpointError, ShapeError, WeightError
from modulora_core.spec import PackedWeight, Quantizer

SHAPES = [(1, 1), (3, 7), (5, 64), (17, 129), (33, 200), (0, 8), (8, 0), (0, 0)]
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
OPTIONS = [Options(bits=bits, group_size=64 if bits % 2 else 24) for bits in range(1, 9)]


def name(options: Options) -> str:
    return f"{options.bits}bits-{options.group_size}"


@pytest.mark.parametrize("options", OPTIONS, ids=name)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"{s[0]}x{s[1]}")
def test_layout_equals_that_of_a_packed_weight(shape, options, generator):
    quantizer = HalfQuadratic(options)
    assert quantizer.layout(shape) == quantizer.pack(torch.randn(shape, generator=generator)).layout


def test_layout_is_arithmetic(monkeypatch):
    """If this fails: a memory plan of a large model quantizes it."""
    monkeypatch.setattr(HalfQuadratic, "pack", lambda *_: pytest.fail("layout packs"))
    assert HalfQuadratic().layout((10**5, 10**5)).shape == (10**5, 10**5)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 20), st.integers(0, 150), st.sampled_from(OPTIONS))
def test_layout_is_exact_for_any_shape(out_features, in_features, options):
    quantizer = HalfQuadratic(options)
    shape = (out_features, in_features)
    assert quantizer.layout(shape) == quantizer.pack(torch.ones(shape)).layout


@pytest.mark.parametrize("bits", range(1, 9))
def test_a_weight_takes_its_bits_and_half_a_bit_for_scale_and_offset(bits):
    """And 32 bits a layer for the unit."""
    assert (
        HalfQuadratic(Options(bits=bits)).layout((2048, 2048)).nbytes
        == 2048**2 * (bits + 0.5) / 8 + 4
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=name)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"{s[0]}x{s[1]}")
def test_kernels_dequantize_to_the_bits_of_the_reference(
    shape, options, dtype, generator, by_the_reference
):
    packed = HalfQuadratic(options).pack(torch.randn(shape, generator=generator))
    ours = HalfQuadratic(options).dequantize_tile(packed, (0, shape[0]), dtype)
    assert ours.dtype == dtype
    assert torch.equal(ours, by_the_reference(packed).to(dtype))


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_dequantize_tile_equals_rows_of_the_whole(data):
    out_features, in_features = data.draw(st.integers(1, 20)), data.draw(st.integers(1, 150))
    start = data.draw(st.integers(0, out_features))
    stop = data.draw(st.integers(start, out_features))
    quantizer = HalfQuadratic(data.draw(st.sampled_from(OPTIONS)))
    packed = quantizer.pack(
        torch.randn(out_features, in_features, generator=torch.Generator().manual_seed(0))
    )
    for dtype in DTYPES:
        whole = quantizer.dequantize_tile(packed, (0, out_features), dtype)
        assert torch.equal(
            quantizer.dequantize_tile(packed, (start, stop), dtype), whole[start:stop]
        )


@pytest.mark.parametrize("options", OPTIONS, ids=name)
def test_without_kernels_any_rows_are_the_same(options, plain_torch, generator, by_the_reference):
    packed = HalfQuadratic(options).pack(torch.randn(9, 131, generator=generator))
    for rows in [(0, 9), (1, 4), (8, 9), (3, 3), (9, 9)]:
        part = HalfQuadratic(options).dequantize_tile(packed, rows, torch.float32)
        assert torch.equal(part, by_the_reference(packed)[slice(*rows)])


@pytest.mark.parametrize("options", OPTIONS, ids=name)
def test_the_error_is_at_most_half_a_step_within_the_range_of_the_codes(options, generator):
    quantizer, w = HalfQuadratic(options), torch.randn(20, 130, generator=generator)
    packed = quantizer.pack(w)
    group = torch.arange(130) // options.group_size
    step, low = (
        (packed.tensors[n].float() * packed.tensors["unit"])[:, group]
        for n in ("scales", "offsets")
    )
    inside = (w >= low) & (w <= low + step * options.levels)
    error = (quantizer.dequantize_tile(packed, (0, 20), torch.float32) - w).abs()
    assert inside.float().mean() > (0.25 if options.bits == 1 else 0.7)
    assert bool((error <= 0.5001 * step)[inside].all())


@pytest.mark.parametrize("columns", [40, 64, 130])
def test_packing_reads_any_strides_and_dtypes_and_changes_nothing(columns, generator):
    w = torch.randn(columns, 30, generator=generator).bfloat16().t()
    before = w.clone()
    strided, contiguous = HalfQuadratic().pack(w), HalfQuadratic().pack(w.contiguous().double())
    assert torch.equal(w, before)
    for key, tensor in contiguous.tensors.items():
        assert torch.equal(tensor, strided.tensors[key])


@pytest.mark.parametrize("nbytes", [1, 4096, 2**30])
def test_packed_bytes_do_not_depend_on_how_much_is_quantized_at_once(
    nbytes, generator, monkeypatch
):
    w = torch.randn(70, 100, generator=generator)
    usual = HalfQuadratic().pack(w)
    monkeypatch.setattr(module, "PACKED_AT_ONCE", nbytes)
    for key, tensor in HalfQuadratic().pack(w).tensors.items():
        assert torch.equal(tensor, usual.tensors[key])


def test_the_same_weight_gives_the_same_bytes_for_any_number_of_threads(generator):
    w = torch.randn(300, 640, generator=generator)
    threads, packed = torch.get_num_threads(), []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            packed.append(HalfQuadratic().pack(w))
    finally:
        torch.set_num_threads(threads)
    assert all(
        torch.equal(tensor, packed[1].tensors[key]) for key, tensor in packed[0].tensors.items()
    )


@pytest.mark.parametrize("rows", [(-1, 2), (0, 5), (3, 2)])
def test_rows_outside_of_the_weight_are_refused(rows, generator):
    packed = HalfQuadratic().pack(torch.randn(4, 6, generator=generator))
    with pytest.raises(ShapeError, match="expected 0 <= start <= stop <= 4"):
        HalfQuadratic().dequantize_tile(packed, rows, torch.float32)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 3e38, -(2.0**120)])
@pytest.mark.parametrize("at", [0, 64])  # in a whole group and in the short last one
def test_weights_that_cannot_be_represented_are_refused(bad, at):
    w = torch.ones(2, 65)
    w[1, at] = bad
    with pytest.raises(
        WeightError, match=r"half-quadratic: expected finite weights below 1\.3e\+36.* \[2, 65\]"
    ):
        HalfQuadratic().pack(w)


@pytest.mark.parametrize(
    "options", [{"bits": 0}, {"bits": 9}, {"bits": 1.58}, {"group_size": 7}, {"group_size": 4097}, {"p": 0}, {"p": 1.1},
                {"beta": 0}, {"iterations": -1}, {"group": 64}],
    ids=str,
)  # fmt: skip
def test_options_that_mean_nothing_are_refused(options):
    with pytest.raises(ValidationError, match=next(iter(options))):
        Options(**options)


def test_options_are_frozen_and_described():
    with pytest.raises(ValidationError, match="frozen"):
        Options().bits = 3
    assert all(field.description for field in Options.model_fields.values())


def test_the_quantizer_is_what_its_spec_says():
    assert HalfQuadratic.spec is SPEC
    assert issubclass(HalfQuadratic, Quantizer)
    assert SPEC.location == f"{HalfQuadratic.__module__}:{HalfQuadratic.__name__}"
    assert {promise.options["bits"] for promise in SPEC.promises} <= set(SPEC.bits)


@pytest.mark.parametrize("compiled", [True, False], ids=["kernels", "reference"])
@pytest.mark.parametrize(
    "metadata",
    [{"bits": 4, "group_size": 32}, {"bits": 5, "group_size": 64}, {"bits": 4}, {"bits": 0, "group_size": 64},
     {"bits": 4, "group_size": 64, "more": 1}, {"bits": 4, "group_size": 0}],
    ids=str,
)  # fmt: skip
def test_tensors_that_do_not_fit_their_metadata_are_refused_before_they_are_read(
    metadata, compiled, monkeypatch
):
    """If this fails: a checkpoint that was edited makes a kernel read beyond the end of its tensors."""
    if not compiled:
        monkeypatch.setattr(kernels, "load", lambda module, device: None)
    packed = HalfQuadratic().pack(torch.ones(8, 63))
    edited = PackedWeight(SPEC.name, 1, packed.shape, packed.tensors, metadata)
    if metadata == {"bits": 4, "group_size": 32}:
        assert packed.tensors["scales"].shape == (8, 1)  # 63 columns are two groups of 32
    with pytest.raises(CheckpointError, match="half-quadratic weight"):
        HalfQuadratic().dequantize_tile(edited, (0, 8), torch.float32)
    for transpose in (False, True):
        with pytest.raises(CheckpointError, match="half-quadratic weight"):
            HalfQuadratic().matmul(torch.ones(1, 8 if transpose else 63), edited, transpose)
