"""The backward saves and keeps no dense weight."""

from __future__ import annotations

import gc
from types import ModuleType

import pytest
import torch
from modulora_conformance.allocations import Allocations

from modulora_core.autograd import FrozenWeight, lora_linear
from modulora_core.dense_products import compute_dtype
from modulora_core.tiles import tile_budget

OUT, IN, RANK = 11, 7, 3

SHAPES = {
    "x": (5, IN),
    "bias": (OUT,),
    "A": (RANK, IN),
    "B": (OUT, RANK),
    "u": (IN,),
    "v": (OUT,),
}


@pytest.mark.parametrize(
    ("names", "trains", "saved"),
    [
        ("x A B", "x A B", ["x", "U", "A", "B"]),
        ("x A B", "A", ["x", "B"]),
        ("x A B", "B", ["U"]),
        ("x A B", "", []),
        ("x", "x", []),
        ("x u v", "x u v", ["x", "Z", "u", "v"]),
        ("x u v", "u", ["x", "v"]),
        ("x u v", "v", ["Z"]),
    ],
)
def test_autograd_saves_the_operands_of_the_formulas(
    toy: ModuleType, names: str, trains: str, saved: list[str]
) -> None:
    quantizer = toy.Toy()
    packed = quantizer.pack(torch.randn(OUT, IN))
    t = {name: torch.randn(SHAPES[name]) for name in names.split()}
    for name, tensor in t.items():
        tensor.requires_grad_(name in trains.split())
    sizes: list[int] = []
    keep = torch.autograd.graph.saved_tensors_hooks(lambda s: sizes.append(s.numel()), lambda s: s)
    with keep:
        lora_linear(
            t["x"],
            FrozenWeight(quantizer, packed),
            A=t.get("A"),
            B=t.get("B"),
            input_scale=t.get("u"),
            output_scale=t.get("v"),
        )
    shapes = {**SHAPES, "U": (5, RANK), "Z": (5, OUT)}  # U = x Aᵀ, Z = (x ⊙ u) Ŵᵀ
    assert sorted(sizes) == sorted(torch.Size(shapes[name]).numel() for name in saved)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_no_dense_weight_is_alive_after_the_forward(toy: ModuleType, dtype: torch.dtype) -> None:
    quantizer = toy.Toy()
    packed = quantizer.pack(torch.randn(256, 128))
    x = torch.randn(4, 128).to(dtype).requires_grad_()
    A, B = torch.randn(2, 128, requires_grad=True), torch.randn(256, 2, requires_grad=True)
    with Allocations([*packed.tensors.values(), x, A, B]) as allocations:
        y = lora_linear(x, FrozenWeight(quantizer, packed), None, A, B)
    gc.collect()
    # y, U and copies of A and B take 7 KiB; a quarter of the fp32 weight is 32 KiB
    assert allocations.alive < 256 * 128
    y.sum().backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_forward_and_backward_hold_few_tiles(toy: ModuleType, dtype: torch.dtype) -> None:
    """A weight of 8 MiB in tiles of 256 KiB."""
    quantizer = toy.Toy()
    packed = quantizer.pack(torch.randn(2048, 1024))
    x = torch.randn(4, 1024).to(dtype).requires_grad_()
    A, B = torch.randn(2, 1024, requires_grad=True), torch.randn(2048, 2, requires_grad=True)
    tile = 256 * 2**10
    with tile_budget(tile), Allocations([x, A, B, *packed.tensors.values()]) as allocations:
        y = lora_linear(x, FrozenWeight(quantizer, packed), None, A, B)
        y.backward(torch.ones_like(y))
    # the toy makes a tile of two fp32 tensors, codes and product, and rounds it
    width = compute_dtype(dtype, torch.device("cpu")).itemsize
    most = 2 * 4 / width + (2 if width < 4 else 1)
    assert tile <= allocations.peak <= most * tile, f"peak {allocations.peak / 2**20:.2f} MiB"


def test_the_graph_keeps_the_packed_weight_alive(toy: ModuleType) -> None:
    quantizer = toy.Toy()
    x = torch.randn(2, IN, requires_grad=True)
    y = lora_linear(x, FrozenWeight(quantizer, quantizer.pack(torch.ones(OUT, IN))))
    gc.collect()
    y.sum().backward()
    torch.testing.assert_close(x.grad, torch.full((2, IN), float(OUT)))
