"""The contract in a rotated basis: tiles, products both ways, windows, rescaling, refusals."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from modulora_kernels import rotation
from modulora_quip_sharp_e8.quantizer import QuIPSharpE8, packed_of, window
from modulora_quip_sharp_e8.reference import Options

from modulora_core import dense_products
from modulora_core.errors import CheckpointError, OptionError, ShapeError
from modulora_core.spec import Calibration
from modulora_core.tiles import tile_budget

BITS = (2, 3, 4)
SHAPES = [(1, 1), (7, 13), (5, 8), (33, 130), (44, 576), (3, 2053)]
"""Columns that are no whole blocks; 72 codes a row; a prime that torch rotates."""


@pytest.fixture(params=BITS)
def options(request):
    return Options(bits=request.param)


@pytest.fixture(params=["kernels", "torch"])
def path(request):
    if request.param == "torch":
        request.getfixturevalue("plain_torch")
    else:
        pytest.importorskip("numba")
    return request.param


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_tiles_and_products_agree_with_dense_matrices(
    shape, path, options, random_solution, generator
):
    solution = random_solution(shape, options)
    W, packed = solution.dequantize(options.bits), packed_of(solution, options)
    quantizer = QuIPSharpE8(options)
    for dtype, limit in ((torch.float32, 2e-6), (torch.float64, 1e-12)):
        tile = quantizer.dequantize_tile(packed, (0, shape[0]), dtype)
        torch.testing.assert_close(tile.double(), W, rtol=0, atol=limit * float(W.abs().max()))
    for rows in (1, 3, 70):
        for transpose in (False, True):
            x = torch.randn(rows, shape[0 if transpose else 1], generator=generator)
            expected = x.double() @ (W if transpose else W.T)
            # rotations spread an error over all coordinates, in proportion to the norm
            limit = 4e-6 * float(x.norm(dim=1).max() * W.norm())
            y = quantizer.matmul(x, packed, transpose)
            torch.testing.assert_close(y.double(), expected, rtol=0, atol=limit)
            y = quantizer.matmul(x.double(), packed, transpose)
            torch.testing.assert_close(y, expected, rtol=0, atol=1e-7 * limit)


@pytest.mark.parametrize("budget", [2 * 8 * 33 * 4, 2**20])
def test_a_tile_has_the_bits_of_the_whole(budget, path, options, random_solution):
    """A strip of eight columns at a time, and all at once."""
    packed = packed_of(random_solution((33, 130), options), options)
    with tile_budget(budget):
        for dtype in (torch.float32, torch.bfloat16, torch.float64):
            whole = QuIPSharpE8(options).dequantize_tile(packed, (0, 33), dtype)
            for start, stop in ((0, 1), (5, 22), (32, 33), (4, 4)):
                tile = QuIPSharpE8(options).dequantize_tile(packed, (start, stop), dtype)
                assert torch.equal(tile, whole[start:stop])


@settings(deadline=None, max_examples=15)
@given(st.integers(1, 40), st.integers(1, 90), st.integers(1, 9), st.sampled_from(BITS))
def test_one_row_and_many_rows_give_one_product(out, columns, rows, bits):
    """One row is multiplied by one kernel, rotations included; more rows by several."""
    quantizer = QuIPSharpE8(Options(bits=bits))
    packed = quantizer.layout((out, columns)).empty("cpu")
    numbers = torch.Generator().manual_seed(out)
    for tensor in packed.tensors.values():
        if tensor.dtype.is_floating_point:
            tensor.copy_(torch.randn(tensor.shape, generator=numbers))
        else:
            drawn = torch.randint(0, 2**16, tensor.shape, generator=numbers)
            tensor.copy_(drawn.to(tensor.dtype))
    x = torch.randn(rows, columns, generator=numbers)
    together = quantizer.matmul(x, packed)
    alone = torch.cat([quantizer.matmul(row[None], packed) for row in x])
    W = quantizer.dequantize_tile(packed, (0, out), torch.float32)
    torch.testing.assert_close(alone, together, rtol=0, atol=4e-6 * float(x.norm() * W.norm()))


@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("units", [False, True])
def test_bf16_is_as_exact_as_the_processor_multiplies(
    units, transpose, options, random_solution, generator, monkeypatch
):
    monkeypatch.setattr(dense_products, "has_bfloat16_units", lambda: units)
    packed = packed_of(random_solution((192, 576), options), options)
    for rows in (1, 40, 300):
        x = torch.randn(rows, 192 if transpose else 576, generator=generator).bfloat16()
        y = QuIPSharpE8(options).matmul(x, packed, transpose)
        exact = QuIPSharpE8(options).matmul(x.double(), packed, transpose)
        assert y.dtype == torch.bfloat16
        # one rounding by at most 2⁻⁸; with units four: rotated inputs, C, the product, the result
        limit = 4 * 2**-9 if units else 2**-8
        assert bool(((y.double() - exact).norm(dim=1) <= limit * exact.norm(dim=1)).all())


@pytest.mark.parametrize("rows", [1, 40])
@pytest.mark.parametrize("transpose", [False, True])
def test_large_activations_do_not_overflow_in_fp16(transpose, rows, random_solution):
    options, side = Options(), "output_scale" if transpose else "input_scale"
    solution = random_solution((6656, 96) if transpose else (96, 11008), options)
    packed = packed_of(replace(solution, scale=torch.tensor([0.005])), options)
    # rotation brings all of it into one coordinate
    x = 1e4 * packed.tensors[side].sign().expand(rows, -1)
    assert float(rotation.rotate(x, packed.tensors[side]).abs().max()) > 65504
    expected = QuIPSharpE8(options).matmul(x.double(), packed, transpose)
    assert float(expected.abs().max()) < 65504
    y = QuIPSharpE8(options).matmul(x.half(), packed, transpose)
    limit = 1e-3 * float(expected.abs().max())
    torch.testing.assert_close(y.double(), expected, rtol=1e-3, atol=limit)


@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("rows", [1, 40])
def test_a_window_is_rows_of_the_whole(rows, transpose, options, random_solution, generator):
    packed = packed_of(random_solution((40, 36), options), options)
    part, quantizer = window(packed, 12, 29), QuIPSharpE8(options)
    W = quantizer.dequantize_tile(packed, (0, 40), torch.float64)[12:29]
    assert torch.equal(quantizer.dequantize_tile(part, (3, 9), torch.float64), W[3:9])
    x = torch.randn(rows, 17 if transpose else 36, generator=generator)
    y = quantizer.matmul(x, part, transpose)
    expected = x.double() @ (W if transpose else W.T)
    torch.testing.assert_close(y.double(), expected, rtol=0, atol=1e-5)
    assert part.bits_per_weight > packed.bits_per_weight  # it carries all codes
    with pytest.raises(ShapeError, match="whole weight"):
        quantizer.rescaled(part, torch.ones(36), torch.ones(17))


def test_a_rescaled_weight_is_the_weight_between_scales(options, random_solution, generator):
    packed = packed_of(random_solution((40, 36), options), options)
    u, v = (0.5 + torch.rand(n, generator=generator) for n in (36, 40))
    u[3], v[5] = -7.0, 1e-3
    rescaled = QuIPSharpE8(options).rescaled(packed, u, v)
    W, moved = (
        QuIPSharpE8(options).dequantize_tile(p, (0, 40), torch.float64) for p in (packed, rescaled)
    )
    # two scales, each rounded to fp16
    torch.testing.assert_close(moved, v[:, None] * W * u, rtol=1.1e-3, atol=0)
    zeros = QuIPSharpE8(options).rescaled(packed, torch.zeros(36), torch.ones(40))
    assert bool((QuIPSharpE8(options).dequantize_tile(zeros, (0, 40), torch.float32) == 0).all())


def test_a_layout_has_codes_and_vectors_alone(options, layer):
    for shape in ((16, 24), (5, 13)):
        packed = QuIPSharpE8(options).pack(layer(*shape)[0], Calibration(layer(*shape)[1], 10))
        assert packed.layout == QuIPSharpE8(options).layout(shape)
        blocks = shape[0] * -(-shape[1] // 8)
        assert packed.nbytes == blocks * options.bits + 2 * sum(shape) + 4
    layout = QuIPSharpE8(Options(bits=2)).layout((4096, 4096))
    assert 2.0 < layout.empty("meta").bits_per_weight <= 2.02


def test_without_calibration_it_says_that_it_needs_one(layer):
    with pytest.raises(OptionError, match="calibrat"):
        QuIPSharpE8().pack(layer(8, 8)[0])


@pytest.mark.parametrize(
    "change",
    [{"bits": 5}, {"bits": "2"}, {"seed": 0}, {"rows": [0, 11]}, {"rows": [1, 12]}, {"rows": 3},
     {"rows": [0.0, 12]}],
    ids=str,
)  # fmt: skip
def test_edited_metadata_is_refused(change, random_solution):
    options = Options()
    packed = packed_of(random_solution((12, 20), options), options)
    edited = type(packed)(
        packed.quantizer, 1, packed.shape, packed.tensors, dict(packed.metadata) | change
    )
    with pytest.raises(CheckpointError, match="metadata"):
        QuIPSharpE8(options).matmul(torch.ones(1, 20), edited)
    with pytest.raises(CheckpointError, match="metadata"):
        QuIPSharpE8(options).dequantize_tile(edited, (0, 12), torch.float32)


def test_tensors_that_do_not_fit_the_metadata_are_refused(options, random_solution):
    packed = packed_of(random_solution((12, 20), options), options)
    for name, tensor in packed.tensors.items():
        for other in (tensor[:-1], tensor.to(torch.float64)):
            tensors = dict(packed.tensors) | {name: other}
            broken = type(packed)(packed.quantizer, 1, packed.shape, tensors, packed.metadata)
            with pytest.raises(CheckpointError, match=name):
                QuIPSharpE8(options).matmul(torch.ones(1, 20), broken)


@pytest.mark.parametrize(
    ("name", "value"),
    [("bits", 8), ("sweeps", -1), ("damping", 0), ("codebook_scale", 0), ("seed", -1), ("size", 1)],
)
def test_options_out_of_range_are_refused(name, value):
    with pytest.raises(ValueError, match=name):
        Options.model_validate({name: value})
