"""The contract in a rotated basis: tiles, products both ways, sizes, windows and rescaling."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from modulora_quip_sharp_e8 import transform
from modulora_quip_sharp_e8.options import Options
from modulora_quip_sharp_e8.products import FEW_ROWS
from modulora_quip_sharp_e8.quantizer import QuIPSharpE8, from_solution, window
from safetensors.torch import save_file

from modulora_core.devices import dense_products
from modulora_core.errors import CheckpointError, OptionError, ShapeError
from modulora_core.spec import Calibration
from modulora_core.tiles import tile_budget

BITS = (2, 3, 4)
SHAPES = [(16, 64), (12, 20), (7, 13), (1, 8), (5, 1), (40, 36), (33, 130)]
ROWS = (1, 3, 40)  # fused kernels and tiles
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@pytest.fixture(params=BITS)
def options(request):
    return Options(bits=request.param)


def dense(solution, options):
    """Ŵ by dense matrices in fp64: the truth."""
    return solution.dequantize(options)


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_tiles_are_the_rows_of_the_reference(shape, options, plain, random_solution, request):
    if plain:
        request.getfixturevalue("plain_torch")
    solution = random_solution(shape, options)
    W, packed = dense(solution, options), from_solution(solution, options)
    whole = QuIPSharpE8(options).dequantize_tile(packed, (0, shape[0]), torch.float32)
    torch.testing.assert_close(whole.double(), W, rtol=0, atol=2e-6 * float(W.abs().max()))
    double = QuIPSharpE8(options).dequantize_tile(packed, (0, shape[0]), torch.float64)
    torch.testing.assert_close(double, W, rtol=0, atol=1e-12 * float(W.abs().max()))


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize(
    "budget", [2 * 8 * 33 * 4, 2**20]
)  # one strip of eight columns at a time, and all at once
def test_a_tile_is_bit_for_bit_the_same_rows_of_the_whole(
    budget, plain, options, random_solution, request
):
    if plain:
        request.getfixturevalue("plain_torch")
    packed = from_solution(random_solution((33, 130), options), options)
    with tile_budget(budget):
        for dtype in (*DTYPES, torch.float64):
            whole = QuIPSharpE8(options).dequantize_tile(packed, (0, 33), dtype)
            assert whole.dtype == dtype
            for start, stop in ((0, 1), (0, 33), (7, 8), (5, 22), (32, 33), (33, 33), (4, 4)):
                tile = QuIPSharpE8(options).dequantize_tile(packed, (start, stop), dtype)
                assert torch.equal(tile, whole[start:stop])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_tile_of_16_bits_is_rounded_once(dtype, options, random_solution):
    packed = from_solution(random_solution((12, 20), options), options)
    tile = QuIPSharpE8(options).dequantize_tile(packed, (0, 12), torch.float32)
    assert torch.equal(QuIPSharpE8(options).dequantize_tile(packed, (0, 12), dtype), tile.to(dtype))


def test_rows_outside_of_the_weight_are_refused(options, random_solution):
    packed = from_solution(random_solution((12, 20), options), options)
    for rows in ((-1, 3), (3, 13), (5, 4)):
        with pytest.raises(ShapeError):
            QuIPSharpE8(options).dequantize_tile(packed, rows, torch.float32)


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("shape", SHAPES)
def test_products_are_those_of_the_reference(
    shape, rows, transpose, plain, options, random_solution, generator, request
):
    if plain:
        request.getfixturevalue("plain_torch")
    solution = random_solution(shape, options)
    W, packed = dense(solution, options), from_solution(solution, options)
    x = torch.randn(
        rows, shape[0] if transpose else shape[1], generator=generator, dtype=torch.float64
    )
    expected = x @ (W if transpose else W.T)
    norm = float(expected.norm()) / expected.numel() ** 0.5
    y = QuIPSharpE8(options).matmul(x, packed, transpose)
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-12 * norm * 10)
    y = QuIPSharpE8(options).matmul(x.float(), packed, transpose)
    # rotations spread the rounding of fp32 over all of a row
    torch.testing.assert_close(y.double(), expected, rtol=0, atol=5e-6 * norm)


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_inputs_are_computed_in_fp32_and_rounded_once(
    dtype, transpose, rows, options, random_solution, generator, monkeypatch
):
    monkeypatch.setattr(dense_products, "has_bfloat16_units", lambda: False)
    packed = from_solution(random_solution((40, 36), options), options)
    x = torch.randn(rows, 40 if transpose else 36, generator=generator).to(dtype)
    y = QuIPSharpE8(options).matmul(x, packed, transpose)
    assert y.dtype == dtype
    assert torch.equal(y, QuIPSharpE8(options).matmul(x.float(), packed, transpose).to(dtype))


@pytest.mark.parametrize("transpose", [False, True])
def test_with_units_for_bf16_inputs_are_multiplied_in_it(
    transpose, options, random_solution, generator, monkeypatch
):
    monkeypatch.setattr(dense_products, "has_bfloat16_units", lambda: True)
    packed = from_solution(random_solution((192, 576), options), options)
    x = torch.randn(FEW_ROWS + 1, 192 if transpose else 576, generator=generator).to(torch.bfloat16)
    y = QuIPSharpE8(options).matmul(x, packed, transpose)
    exact = QuIPSharpE8(options).matmul(x.double(), packed, transpose)
    assert y.dtype == torch.bfloat16
    # the rotated input, the tile, the product and the result are each rounded, by less than 2^-9 in the mean, and rotations keep norms
    assert bool(((y.double() - exact).norm(dim=1) <= 4 * 2**-9 * exact.norm(dim=1)).all())
    assert not torch.equal(
        y, QuIPSharpE8(options).matmul(x.float(), packed, transpose).to(torch.bfloat16)
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", ROWS)
def test_both_directions_are_adjoint(rows, dtype, options, random_solution, generator):
    """⟨W x, y⟩ = ⟨x, Wᵀ y⟩ to rounding: one rounding of each value at 16 bits."""
    packed = from_solution(random_solution((192, 576), options), options)
    x, y = (
        torch.randn(rows, 576, generator=generator).to(dtype),
        torch.randn(rows, 192, generator=generator).to(dtype),
    )
    Wx, Wty = (
        QuIPSharpE8(options).matmul(given, packed, t).double()
        for given, t in ((x, False), (y, True))
    )
    one, other = (Wx * y).sum(dim=1), (x * Wty).sum(dim=1)
    size = Wx.norm(dim=1) * y.double().norm(dim=1)
    assert bool(((one - other).abs() <= 4 * torch.finfo(dtype).eps * size).all())


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("transpose", [False, True])
def test_activations_of_ten_thousand_do_not_overflow_in_fp16(transpose, rows, random_solution):
    options, side = Options(), "output_scale" if transpose else "input_scale"
    solution = random_solution((6656, 96) if transpose else (96, 11008), options)
    packed = from_solution(replace(solution, scale=torch.tensor([0.005])), options)
    x = 1e4 * packed.tensors[side].sign().expand(
        rows, -1
    )  # all of it in one coordinate, once it is rotated
    assert float(transform.rotate(x, before=packed.tensors[side]).abs().max()) > 65504
    expected = QuIPSharpE8(options).matmul(x.double(), packed, transpose)
    assert float(expected.abs().max()) < 65504
    y = QuIPSharpE8(options).matmul(x.half(), packed, transpose)
    torch.testing.assert_close(
        y.double(), expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max())
    )


def test_leading_dimensions_and_no_rows(options, random_solution, generator):
    packed = from_solution(random_solution((12, 20), options), options)
    x = torch.randn(2, 3, 20, generator=generator)
    y = QuIPSharpE8(options).matmul(x, packed)
    assert torch.equal(y.view(6, 12), QuIPSharpE8(options).matmul(x.view(6, 20), packed))
    assert QuIPSharpE8(options).matmul(x[:0], packed).shape == (0, 3, 12)
    # four rows at a time have sums of other lanes than one has, on some processors: where a row is may change its last bits
    for part, expected in ((x.transpose(0, 1), y.transpose(0, 1)), (x[0, 0], y[0, 0])):
        found = QuIPSharpE8(options).matmul(part, packed)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("transpose", [False, True])
def test_a_wrong_last_dimension_is_refused(transpose, options, random_solution):
    packed = from_solution(random_solution((12, 20), options), options)
    for x in (torch.ones(3, 21), torch.ones(())):
        with pytest.raises(ShapeError, match=r"\[12, 20\]"):
            QuIPSharpE8(options).matmul(x, packed, transpose)


@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("rows", [2, 40])
def test_a_window_is_rows_of_the_whole(rows, transpose, options, random_solution, generator):
    packed = from_solution(random_solution((40, 36), options), options)
    part = window(packed, 12, 29)
    W = QuIPSharpE8(options).dequantize_tile(packed, (0, 40), torch.float64)[12:29]
    assert torch.equal(QuIPSharpE8(options).dequantize_tile(part, (0, 17), torch.float64), W)
    assert torch.equal(QuIPSharpE8(options).dequantize_tile(part, (3, 9), torch.float64), W[3:9])
    x = torch.randn(rows, 17 if transpose else 36, generator=generator, dtype=torch.float64)
    y = QuIPSharpE8(options).matmul(x, part, transpose)
    torch.testing.assert_close(y, x @ (W if transpose else W.T), rtol=0, atol=1e-12)
    assert part.bits_per_weight > packed.bits_per_weight  # it says what it carries
    with pytest.raises(ShapeError):
        QuIPSharpE8(options).rescaled(part, torch.ones(36), torch.ones(17))


def test_a_rescaled_weight_is_the_weight_between_scales(options, random_solution, generator):
    packed = from_solution(random_solution((40, 36), options), options)
    u, v = (0.5 + torch.rand(n, generator=generator) for n in (36, 40))
    u[3], v[5] = -7.0, 1e-3
    rescaled = QuIPSharpE8(options).rescaled(packed, u, v)
    assert rescaled.layout == packed.layout
    assert torch.equal(rescaled.tensors["codes"], packed.tensors["codes"])
    W, moved = (
        QuIPSharpE8(options).dequantize_tile(p, (0, 40), torch.float64) for p in (packed, rescaled)
    )
    # two scales, each rounded to fp16
    torch.testing.assert_close(moved, v[:, None] * W * u, rtol=2.2e-3 / 2, atol=0)


def test_scales_that_vanish_are_refused_by_nothing_and_stay_finite(options, random_solution):
    packed = from_solution(random_solution((12, 20), options), options)
    rescaled = QuIPSharpE8(options).rescaled(packed, torch.zeros(20), torch.ones(12))
    assert bool((QuIPSharpE8(options).dequantize_tile(rescaled, (0, 12), torch.float32) == 0).all())


def test_two_bits_of_4096_by_4096_are_at_most_two_and_a_fiftieth_in_the_file(tmp_path):
    layout = QuIPSharpE8(Options(bits=2)).layout((4096, 4096))
    path = tmp_path / "packed.safetensors"
    save_file(dict(layout.empty("cpu").tensors), path)
    assert 2.0 < 8 * path.stat().st_size / 4096**2 <= 2.02


def test_the_layout_is_what_pack_gives(options, layer):
    for shape in ((16, 24), (5, 13)):
        W, H = layer(*shape)
        packed = QuIPSharpE8(options).pack(W, Calibration(H, 10))
        assert packed.layout == QuIPSharpE8(options).layout(shape)
        blocks = shape[0] * -(-shape[1] // 8)
        assert packed.nbytes == blocks * options.bits + 2 * sum(shape) + 4


def test_packing_twice_gives_the_same_bytes(options, layer):
    W, H = layer(24, 40)
    one, other = (QuIPSharpE8(options).pack(W, Calibration(H, 10)) for _ in range(2))
    assert all(torch.equal(one.tensors[name], other.tensors[name]) for name in one.tensors)


def test_without_calibration_it_says_what_it_needs(layer):
    with pytest.raises(OptionError, match="calibrat"):
        QuIPSharpE8().pack(layer(8, 8)[0])


@pytest.mark.parametrize(
    "change",
    [{"bits": 5}, {"bits": "2"}, {"seed": 0}, {"rows": [0, 11]}, {"rows": [1, 12]}, {"rows": [0]}, {"rows": 3}, {"rows": [0.0, 12]}],
    ids=str,
)  # fmt: skip
def test_metadata_that_was_edited_is_refused(change, random_solution):
    options = Options()
    packed = from_solution(random_solution((12, 20), options), options)
    edited = type(packed)(
        packed.quantizer, 1, packed.shape, packed.tensors, dict(packed.metadata) | change
    )
    for use in (lambda: QuIPSharpE8(options).matmul(torch.ones(1, 20), edited),
                lambda: QuIPSharpE8(options).dequantize_tile(edited, (0, 12), torch.float32)):  # fmt: skip
        with pytest.raises(CheckpointError):
            use()


def test_tensors_that_do_not_fit_the_metadata_are_refused(options, random_solution):
    packed = from_solution(random_solution((12, 20), options), options)
    for name in packed.tensors:
        for tensor in (packed.tensors[name][:-1], packed.tensors[name].to(torch.float64)):
            broken = type(packed)(
                packed.quantizer,
                1,
                packed.shape,
                dict(packed.tensors) | {name: tensor},
                packed.metadata,
            )
            with pytest.raises(CheckpointError, match=name):
                QuIPSharpE8(options).matmul(torch.ones(1, 20), broken)


@pytest.mark.parametrize(
    ("name", "value"),
    [("bits", 8), ("sweeps", -1), ("damping", 0), ("codebook_scale", 0), ("seed", -1), ("size", 1)],
)
def test_options_out_of_range_are_refused(name, value):
    with pytest.raises(ValueError, match=name):
        Options.model_validate({name: value})
