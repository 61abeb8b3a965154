"""INT8's kernels give the bits of the reference; weights, options and tensors are refused."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from modulora_conformance.fixtures import without_kernels
from modulora_int8 import reference
from modulora_int8.quantizer import INT8, Options
from pydantic import ValidationError

from modulora_core.errors import CheckpointError, WeightError
from modulora_core.spec import PackedWeight, Quantizer

SHAPES = [(1, 1), (3, 7), (17, 129), (33, 200), (0, 8), (8, 0)]
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
OPTIONS = [Options(group_size=g) for g in (None, 2, 48, 64, 1000)]

shapes = pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"{s[0]}x{s[1]}")
options = pytest.mark.parametrize("options", OPTIONS, ids=lambda o: f"G{o.group_size}")
compiled = pytest.mark.parametrize("compiled", [True, False], ids=["kernels", "reference"])


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def by_the_reference(packed: PackedWeight) -> torch.Tensor:
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


@options
def test_the_error_is_at_most_half_a_step(options, generator):
    w = torch.randn(20, 131, generator=generator).to(torch.float16)
    packed = INT8(options).pack(w)
    G = options.group_size or 131
    step = packed.tensors["scales"].repeat_interleave(G, dim=1)[:, :131] / 127
    error = (INT8(options).dequantize_tile(packed, (0, 20), torch.float32) - w.float()).abs()
    assert bool((error <= 0.5001 * step).all()), (error / step).max()


@options
@pytest.mark.parametrize("shape", [(37, 129), (5, 2113)], ids=str)
def test_a_product_of_one_row_is_close_to_the_reference(shape, options, generator):
    packed = INT8(options).pack(torch.randn(shape, generator=generator))
    W, x = by_the_reference(packed).double(), torch.randn(1, shape[1], generator=generator)
    bound = (shape[1] + 3) * 2.0**-23 * (x.double().abs() @ W.abs().T)
    assert bool(((INT8(options).matmul(x, packed) - x.double() @ W.T).abs() <= bound).all())


@compiled
@pytest.mark.parametrize("options", [Options(), Options(group_size=48)], ids=str)
def test_looked_up_rows_have_the_bits_of_the_reference(options, compiled, generator, monkeypatch):
    packed = INT8(options).pack(torch.randn(41, 130, generator=generator))
    if not compiled:
        without_kernels(monkeypatch)
    W = by_the_reference(packed)
    for ids in (
        torch.randint(0, 41, (3, 50), generator=generator),
        torch.tensor(40),
        torch.empty(0, 2, dtype=torch.int32),
        torch.arange(41, dtype=torch.uint8).view(1, 41),
    ):
        for dtype in DTYPES:
            rows = INT8(options).lookup(ids, packed, dtype)
            assert rows.dtype == dtype
            assert torch.equal(rows, W[ids.long()].to(dtype)), (ids.shape, dtype)


def test_a_lookup_refuses_ids_in_the_words_of_the_core(generator):
    packed = INT8().pack(torch.randn(5, 8, generator=generator))
    for wrong in (-1, 5):
        said = []
        for lookup in (INT8().lookup, partial(Quantizer.lookup, INT8())):
            with pytest.raises(IndexError) as refused:
                lookup(torch.tensor([[2, wrong]]), packed, torch.float32)
            said.append(str(refused.value))
        assert said[0] == said[1]
    with pytest.raises(CheckpointError):
        edited = replace(packed, metadata={"group_size": 2})
        INT8().lookup(torch.tensor([2]), edited, torch.float32)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 3e38])
@pytest.mark.parametrize("at", [0, 64])  # in a whole group and in the short last one
@pytest.mark.parametrize("options", [Options(), Options(group_size=48)], ids=str)
@compiled
def test_weights_that_cannot_be_represented_are_refused(bad, at, options, compiled, monkeypatch):
    """3e38 is finite, but its product with a code is not."""
    if not compiled:
        without_kernels(monkeypatch)
    w = torch.ones(2, 65)
    w[1, at] = bad
    with pytest.raises(WeightError, match=r"int8: expected finite weights .* shape \[2, 65\]"):
        INT8(options).pack(w)


@pytest.mark.parametrize("value", [1, 0, -8])
def test_a_group_size_below_two_is_refused(value):
    with pytest.raises(ValidationError, match="greater than or equal to 2"):
        Options(group_size=value)


@pytest.mark.parametrize(
    "metadata",
    [{"group_size": 8}, {"group_size": -1}, {}, {"group_size": None, "more": 1}],
    ids=str,
)
def test_tensors_that_do_not_match_their_metadata_are_refused(metadata):
    """If this fails: an edited checkpoint makes a kernel read beyond the end of its tensors."""
    packed = INT8().pack(torch.ones(8, 63))
    edited = PackedWeight("int8", 1, packed.shape, packed.tensors, metadata)
    with pytest.raises(CheckpointError, match="int8 weight"):
        INT8().dequantize_tile(edited, (0, 8), torch.float32)
    for x, transpose in ((torch.ones(1, 63), False), (torch.ones(1, 8), True)):
        with pytest.raises(CheckpointError, match="int8 weight"):
            INT8().matmul(x, edited, transpose)
