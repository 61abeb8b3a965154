"""Kernels against the reference, odd shapes, and refusals. The conformance kit checks the rest."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from modulora_conformance.fixtures import without_kernels
from modulora_half_quadratic import SPEC
from modulora_half_quadratic import quantizer as module
from modulora_half_quadratic.quantizer import HalfQuadratic, Options
from pydantic import ValidationError

from modulora_core.errors import CheckpointError, WeightError

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


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 20), st.integers(0, 150), st.sampled_from(OPTIONS))
def test_layout_is_exact_for_any_shape_even_an_empty_one(out_features, in_features, options):
    quantizer, shape = HalfQuadratic(options), (out_features, in_features)
    assert quantizer.layout(shape) == quantizer.pack(torch.ones(shape)).layout


def test_layout_is_arithmetic(monkeypatch):
    """If this fails: a memory plan of a large model quantizes it."""
    monkeypatch.setattr(HalfQuadratic, "pack", lambda *_: pytest.fail("layout packs"))
    bits = HalfQuadratic(Options(bits=7)).layout((2048, 2048)).nbytes * 8
    assert bits == 2048**2 * 7.5 + 32


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: f"{options.bits} bits")
def test_the_error_is_at_most_half_a_step_within_the_range_of_the_codes(options, generator):
    w = torch.randn(20, 130, generator=generator)
    packed = HalfQuadratic(options).pack(w)
    group = torch.arange(130) // options.group_size
    step, low = (
        (packed.tensors[n].float() * packed.tensors["unit"])[:, group]
        for n in ("scales", "offsets")
    )
    inside = (w >= low) & (w <= low + step * options.levels)
    error = (HalfQuadratic(options).dequantize_tile(packed, (0, 20), torch.float32) - w).abs()
    assert inside.float().mean() > (0.25 if options.bits == 1 else 0.7)
    assert bool((error <= 0.5001 * step)[inside].all())


@pytest.mark.parametrize("nbytes", [1, 4096])
def test_packed_bytes_do_not_depend_on_how_much_is_quantized_at_once(nbytes, monkeypatch):
    _, usual = packed_of(Options(), (70, 100))
    monkeypatch.setattr(module, "PACKED_AT_ONCE", nbytes)
    _, parts = packed_of(Options(), (70, 100))
    for name, tensor in parts.tensors.items():
        assert torch.equal(tensor, usual.tensors[name])


@pytest.mark.parametrize("bad", [math.nan, -math.inf, 3e38, -(2.0**120)])
@pytest.mark.parametrize("at", [0, 64])  # in a whole group, and in the short last one
def test_weights_without_a_representation_are_refused(bad, at):
    w = torch.ones(2, 65)
    w[1, at] = bad
    message = r"half-quadratic: expected finite weights below 1\.3e\+36.* \[2, 65\]"
    with pytest.raises(WeightError, match=message):
        HalfQuadratic().pack(w)


@pytest.mark.parametrize(
    "options", [{"bits": 0}, {"bits": 1.58}, {"group_size": 7}, {"p": 1.1}, {"beta": 0}], ids=str
)
def test_options_out_of_range_are_refused(options):
    with pytest.raises(ValidationError, match=next(iter(options))):
        Options(**options)


@pytest.mark.parametrize("compiled", [True, False], ids=["kernels", "reference"])
@pytest.mark.parametrize(
    "metadata",
    [{"bits": 5, "group_size": 64}, {"bits": 4}, {"bits": 4, "group_size": 0}],
    ids=str,
)
def test_tensors_that_do_not_match_their_metadata_are_refused(metadata, compiled, monkeypatch):
    """If this fails: an edited checkpoint causes an out-of-bounds read in a kernel."""
    if not compiled:
        without_kernels(monkeypatch)
    quantizer, packed = packed_of(Options(), (8, 63))
    edited = replace(packed.layout, metadata=metadata).fill(packed.tensors)
    with pytest.raises(CheckpointError, match="half-quadratic weight"):
        quantizer.dequantize_tile(edited, (0, 8), torch.float32)
    for transpose, features in ((False, 63), (True, 8)):
        with pytest.raises(CheckpointError, match="half-quadratic weight"):
            quantizer.matmul(torch.ones(1, features), edited, transpose)


def test_promises_are_for_widths_of_the_spec():
    assert {promise.options["bits"] for promise in SPEC.promises} <= set(SPEC.bits)
