"""CPU kernels and plain torch against the definition: tiles and products of random walks."""

import math

import modulora_kernels as kernels
import pytest
import torch
from modulora_conformance.compiled_kernels import SHAPES, CompiledKernels
from modulora_qtip import codes, trellis
from modulora_qtip.quantizer import KERNELS, QTIP, packed_of
from modulora_qtip.reference import Options

from modulora_core.packed import PackedWeight


def in_turn(names):
    """Each code function compiles kernels of its own for 10 to 30 seconds: one runs always."""
    return [
        name if name == "bytes" else pytest.param(name, marks=pytest.mark.slow) for name in names
    ]


def random_C(bits, states, code, generator):
    strings = torch.randint(
        -(2**15), 2**15, (5, 3, trellis.units(bits)), generator=generator, dtype=torch.int16
    )
    facts = {"bits": bits, "states": states, "code": code, "hadamard": "full"}
    C = PackedWeight("qtip", 1, (48, 80), {"trellis": strings}, facts)
    return C, trellis.decode(strings, bits, states, code)


@pytest.mark.parametrize("bits", [*range(1, 9), 1.5, 2.5, 3.5, 7.5])
@pytest.mark.parametrize("code", in_turn(codes.CODES))
def test_tiles_of_every_width_and_code_are_the_definitions(bits, code, generator):
    pytest.importorskip("numba")
    module = kernels.for_device(KERNELS, torch.device("cpu"))
    for states in (math.ceil(bits) + 6, 16):
        C, dense = random_C(bits, states, code, generator)
        assert torch.equal(module.tile(C, (0, 48), torch.float32), dense)
        assert torch.equal(module.tile(C, (5, 37), torch.float32), dense[5:37])
        assert torch.equal(module.tile(C, (5, 37), torch.bfloat16), dense[5:37].bfloat16())


@pytest.mark.parametrize("path", ["kernels", "torch"])
@pytest.mark.parametrize("shape", [(128, 256), (100, 130)])
@pytest.mark.parametrize("bits", [2.5, 4])
def test_blocks_of_128_are_rotated_apart_and_padding_is_cut(
    path, shape, bits, request, random_solution, generator
):
    if path == "torch":
        request.getfixturevalue("plain_torch")

    options = Options(bits=bits, layout="exl3", code="mul1")
    solution = random_solution(shape, options)
    packed = packed_of(solution, shape, options)
    ones = torch.ones_like(solution.scale)
    dense = type(solution)(solution.trellis, solution.suh, solution.svh, ones).dequantize(options)
    dense = dense[: shape[0], : shape[1]]
    tile = QTIP().dequantize_tile(packed, (3, shape[0]), torch.float64)
    assert torch.allclose(tile, dense[3:], rtol=0, atol=1e-9)
    for rows in (1, 5):
        for transpose, M in ((False, dense.T), (True, dense)):
            x = torch.randn(rows, len(M), generator=generator)
            expected = x.double() @ M
            y = QTIP().matmul(x, packed, transpose)
            assert (y - expected).norm() <= 1e-5 * expected.norm()


@pytest.mark.slow
class TestKernels(CompiledKernels):
    instruction_sets = ("avx2",)  # the core and nf4 compare code without AVX2
    loops_of_core = True
    rounding = 1e-5
    """A tile is a rotation, whose sums are made in another order. A wrong code moves it by 1e-3."""

    OPTIONS = (Options(), Options(bits=3, states=16, code="mcg"))
    """2 bits and more; sums of bytes and halves. mul1 has a part of each, and costs 20 s."""

    @pytest.fixture
    def quantizers(self):
        return [QTIP(options) for options in self.OPTIONS]

    @pytest.fixture
    def weights(self, random_solution):
        return [
            (QTIP(options), packed_of(random_solution(shape, options), shape, options))
            for options in self.OPTIONS
            for shape in SHAPES
        ]
