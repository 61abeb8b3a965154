"""What the int8 quantizer promises: ranges, layouts, products, refusals; and kernels give the reference's values."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from modulora_int8 import SPEC, reference
from modulora_int8.quantizer import INT8, Options
from pydantic import ValidationError

from modulora_core import kernels
from modulora_core.errors import CheckpointError, WeightError
from modulora_core.spec import PackedWeight, Quantizer

SHAPES = [(1, 1), (3, 7), (5, 64), (17, 129), (33, 200), (0, 8), (8, 0)]
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
OPTIONS = [Options(group_size=g) for g in (None, 2, 48, 64, 1000)]


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def without_kernels(monkeypatch) -> None:
    """From here on the path runs that runs where no kernel can."""
    monkeypatch.setattr(kernels, "load", lambda module, device: None)


def by_the_reference(packed: PackedWeight) -> torch.Tensor:
    """All of Ŵ from reference.py alone, fp32."""
    t = packed.tensors
    return reference.dequantize(t["codes"], t["scales"], packed.metadata["group_size"])


def name(options: Options) -> str:
    return f"G{options.group_size}"


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 40), st.integers(0, 300), st.sampled_from(OPTIONS))
def test_layout_equals_that_of_a_packed_weight(out_features, in_features, options):
    quantizer, shape = INT8(options), (out_features, in_features)
    assert quantizer.layout(shape) == quantizer.pack(torch.ones(shape)).layout


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=name)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"{s[0]}x{s[1]}")
def test_kernels_dequantize_to_the_bits_of_the_reference(shape, options, dtype, generator):
    w = torch.randn(shape, generator=generator)
    w[: shape[0] // 3] = 0
    packed = INT8(options).pack(w)
    ours = INT8(options).dequantize_tile(packed, (0, shape[0]), dtype)
    assert ours.dtype == dtype
    assert torch.equal(ours, by_the_reference(packed).to(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=name)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"{s[0]}x{s[1]}")
def test_kernels_pack_to_the_bytes_of_the_reference(shape, options, dtype, generator, monkeypatch):
    w = (
        torch.randn(shape, generator=generator)
        * torch.logspace(-30, 5, max(1, shape[0]))[: shape[0], None]
    )
    w[shape[0] // 2 :] *= torch.logspace(-5, 0, max(1, shape[1]))[: shape[1]]
    w = w.clamp(-65504, 65504).to(dtype)
    compiled = INT8(options).pack(w)
    without_kernels(monkeypatch)
    plain = INT8(options).pack(w)
    assert torch.equal(plain.tensors["codes"], compiled.tensors["codes"])
    assert torch.equal(plain.tensors["scales"], compiled.tensors["scales"])


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_rounding_to_fp16_has_the_bits_of_the_reference_for_any_values(data):
    values = data.draw(st.lists(st.floats(-70000, 70000, width=32), min_size=1, max_size=40))
    W = torch.tensor([values])
    packed = INT8().pack(W)
    codes, scales = reference.quantize(W)
    assert torch.equal(packed.tensors["codes"], codes)
    assert torch.equal(packed.tensors["scales"], scales)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_dequantize_tile_equals_rows_of_the_whole(data):
    out_features, in_features = data.draw(st.integers(1, 20)), data.draw(st.integers(1, 150))
    start = data.draw(st.integers(0, out_features))
    stop = data.draw(st.integers(start, out_features))
    quantizer = INT8(data.draw(st.sampled_from(OPTIONS)))
    packed = quantizer.pack(
        torch.randn(out_features, in_features, generator=torch.Generator().manual_seed(0))
    )
    for dtype in DTYPES:
        whole = quantizer.dequantize_tile(packed, (0, out_features), dtype)
        part = quantizer.dequantize_tile(packed, (start, stop), dtype)
        assert torch.equal(part, whole[start:stop])


@pytest.mark.parametrize("options", OPTIONS, ids=name)
def test_without_kernels_any_rows_are_the_same(options, generator, monkeypatch):
    without_kernels(monkeypatch)
    packed = INT8(options).pack(torch.randn(9, 131, generator=generator))
    for rows in [(0, 9), (1, 4), (8, 9), (3, 3), (9, 9)]:
        part = INT8(options).dequantize_tile(packed, rows, torch.float32)
        assert torch.equal(part, by_the_reference(packed)[slice(*rows)])


@pytest.mark.parametrize("options", OPTIONS, ids=name)
def test_the_error_is_at_most_half_a_step(options, generator):
    w = torch.randn(20, 131, generator=generator).to(torch.float16)
    packed = INT8(options).pack(w)
    G = options.group_size or 131
    step = packed.tensors["scales"].repeat_interleave(G, dim=1)[:, :131] / 127
    error = (INT8(options).dequantize_tile(packed, (0, 20), torch.float32) - w.float()).abs()
    assert bool((error <= 0.5001 * step).all()), (error / step).max()


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
    for options in (Options(), Options(group_size=48)):
        packed = INT8(options).pack(torch.randn(shape, generator=generator))
        W = by_the_reference(packed).double()
        x = torch.randn(rows, shape[0] if transpose else shape[1], generator=generator).to(dtype)
        y = INT8(options).matmul(x, packed, transpose)
        exact = x.double() @ (W if transpose else W.t())
        magnitude = x.double().abs() @ (W if transpose else W.t()).abs()
        assert y.dtype == dtype
        assert y.shape == exact.shape
        error = (
            ((y.double() - exact).abs() / magnitude.clamp(min=1e-30)).max().item() if rows else 0.0
        )
        assert error <= TOLERANCE[dtype], error


@pytest.mark.parametrize("compiled", [True, False], ids=["kernels", "reference"])
@pytest.mark.parametrize("options", [Options(), Options(group_size=48)], ids=name)
def test_looked_up_rows_have_the_bits_of_the_reference(options, compiled, generator, monkeypatch):
    packed = INT8(options).pack(torch.randn(41, 130, generator=generator))
    if not compiled:
        without_kernels(monkeypatch)
    W = by_the_reference(packed)
    for ids in (torch.randint(0, 41, (3, 50), generator=generator), torch.tensor(40), torch.empty(0, 2, dtype=torch.int32),
                torch.arange(41, dtype=torch.uint8).view(1, 41)):  # fmt: skip
        for dtype in DTYPES:
            rows = INT8(options).lookup(ids, packed, dtype)
            assert rows.dtype == dtype
            assert torch.equal(rows, W[ids.long()].to(dtype)), (ids.shape, dtype)


def test_a_lookup_refuses_what_the_core_refuses_in_its_words(generator):
    packed = INT8().pack(torch.randn(5, 8, generator=generator))
    for wrong in (-1, 5):
        said = []
        for lookup in (INT8().lookup, partial(Quantizer.lookup, INT8())):
            with pytest.raises(IndexError) as refused:
                lookup(torch.tensor([[2, wrong]]), packed, torch.float32)
            said.append(str(refused.value))
        assert said[0] == said[1]
    edited = replace(packed, metadata={"group_size": 2})
    with pytest.raises(CheckpointError):
        INT8().lookup(torch.tensor([2]), edited, torch.float32)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 3e38])
@pytest.mark.parametrize("at", [0, 64])  # in a whole group and in the short last one
@pytest.mark.parametrize("options", [Options(), Options(group_size=48)], ids=name)
@pytest.mark.parametrize("compiled", [True, False], ids=["kernels", "reference"])
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


def test_the_quantizer_is_what_its_spec_says():
    assert INT8.spec is SPEC
    assert issubclass(INT8, Quantizer)
    assert SPEC.location == f"{INT8.__module__}:{INT8.__name__}"


@pytest.mark.parametrize(
    "metadata",
    [{"group_size": 8}, {"group_size": -1}, {}, {"group_size": None, "more": 1}],
    ids=str,
)
def test_tensors_that_do_not_fit_their_metadata_are_refused_before_they_are_read(metadata):
    """If this fails: a checkpoint that was edited makes a kernel read beyond the end of its tensors."""
    packed = INT8().pack(torch.ones(8, 63))
    edited = PackedWeight("int8", 1, packed.shape, packed.tensors, metadata)
    with pytest.raises(CheckpointError, match="int8 weight"):
        INT8().dequantize_tile(edited, (0, 8), torch.float32)
    for transpose in (False, True):
        with pytest.raises(CheckpointError, match="int8 weight"):
            INT8().matmul(torch.ones(1, 8 if transpose else 63), edited, transpose)
