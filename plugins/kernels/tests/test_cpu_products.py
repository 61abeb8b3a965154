"""Tiles and products of an outsider's decoder against float64."""

import importlib

import pytest
import torch

from modulora_core.packed import PackedWeight

pytest.importorskip("numba")

from modulora_kernels.cpu import choices

SHAPES = [(1, 1), (5, 3), (17, 130), (300, 513), (33, 2100), (2100, 40)]
"""(out, in): no multiple of a block, and more of both than is decoded at once."""

FP32, BF16 = torch.float32, torch.bfloat16

DECODER = """
from modulora_kernels.cpu import CPUKernels, jit, narrow

@jit()
def decode(weight, row, start, columns, out):
    codes, scales = weight
    for r in range(len(out)):
        for k in range(columns):
            out[r, k] = narrow(codes[row + r, start + k] * scales[row + r], out[r, k])

def operands(packed):
    return packed.tensors["codes"], packed.tensors["scales"]

kernels = CPUKernels(decode, operands)
rounding = CPUKernels(decode, operands, rounds=True)
tile, product = kernels.tile, kernels.product
"""
"""A decoder that no plugin of ours has: whole numbers times a row's scale."""


def packed(out_features, in_features):
    """A weight, and Ŵ in float64."""
    generator = torch.Generator().manual_seed(out_features)
    shape = (out_features, in_features)
    codes = torch.randint(-128, 128, shape, dtype=torch.int8, generator=generator)
    scales = torch.rand(out_features, generator=generator) / 128
    weight = PackedWeight("outsider", 1, shape, {"codes": codes, "scales": scales})
    return weight, (codes.float() * scales[:, None]).double()


def imported(folder, source, name):
    (folder / f"{name}.py").write_text(source, encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        return importlib.import_module(name)


@pytest.fixture(scope="module")
def module(tmp_path_factory):
    return imported(tmp_path_factory.mktemp("rows"), DECODER, "outsiders_rows")


@pytest.fixture(params=[FP32, BF16], ids=str)
def way(request, monkeypatch):
    """The dtype of products of few rows: all products go this way."""
    inner = request.param
    monkeypatch.setattr(choices, "dtype_of_few", lambda *_: inner)
    return inner


def product(module, weight, x, transpose):
    y = module.product(x, weight, transpose)
    assert y.shape == (*x.shape[:-1], weight.shape[1 if transpose else 0])
    assert y.dtype == x.dtype
    return y


def allowed(way, terms):
    """The error of a sum of so many products, as a part of the sum of their magnitudes.

    Each product and each addition rounds by 2⁻²⁴. Weights and inputs in bf16, which has eight
    significant bits, are rounded by 2⁻⁸.
    """
    return terms * 2 * 2.0**-24 + ((1 + 2.0**-8) ** 2 - 1 if way is BF16 else 0)


def check(module, way, shape, n):
    weight, W = packed(*shape)
    for transpose in (False, True):
        M = W if transpose else W.T
        x = torch.randn(n, len(M))
        bound = allowed(way, len(M)) * (x.double().abs() @ M.abs())
        error = (product(module, weight, x, transpose) - x.double() @ M).abs()
        assert bool((error <= bound + 1e-30).all())


@pytest.mark.parametrize("n", [1, 4, 13, 33])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_products_are_those_of_the_decoded_weight(module, way, shape, n):
    check(module, way, shape, n)


@pytest.mark.parametrize(
    "x",
    [torch.ones(65, 6), torch.ones(2, 6).double(), torch.ones(2, 5), torch.ones(0, 6),
     torch.ones(()), torch.ones(2, 6, device="meta")],
    ids=["many rows", "fp64", "another last dimension", "no rows", "a scalar", "another device"],
)  # fmt: skip
def test_other_inputs_are_left_to_tiles(module, x):
    assert module.product(x, packed(4, 6)[0], False) is None
