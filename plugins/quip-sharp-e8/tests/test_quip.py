"""The contract in a rotated basis: tiles, products both ways, windows, rescaling, refusals."""

from dataclasses import replace

import pytest
import torch
from modulora_conformance import compiled_kernels
from modulora_kernels import rotation
from modulora_quip_sharp_e8.quantizer import QuIPSharpE8, packed_of, window
from modulora_quip_sharp_e8.reference import Options

from modulora_core.errors import CheckpointError, ShapeError

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


@pytest.mark.slow
class TestKernels(compiled_kernels.CompiledKernels):
    """Mapped files, the end of memory, other processors, several threads."""

    instruction_sets = ("avx2",)  # the core and nf4 compare code without AVX2
    loops_of_core = True
    rounding = 1e-5
    """A tile is a rotation, whose sums are made in another order. A wrong code moves it by 1e-3."""

    @pytest.fixture
    def quantizers(self):
        return [QuIPSharpE8(Options(bits=bits)) for bits in BITS]

    @pytest.fixture
    def weights(self, random_solution):
        """Codes and residuals of every bit pattern."""
        options = [Options(bits=bits) for bits in BITS]
        return [
            (QuIPSharpE8(chosen), packed_of(random_solution(shape, chosen), chosen))
            for chosen in options
            for shape in compiled_kernels.SHAPES
        ]
