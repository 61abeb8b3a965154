"""The backward saves and keeps no dense weight."""

import pytest
import torch

from modulora_core.autograd import FrozenWeight, lora_linear

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
def test_autograd_saves_the_operands_of_the_formulas(toy, names, trains, saved):
    quantizer = toy.Toy()
    packed = quantizer.pack(torch.randn(OUT, IN))
    t = {name: torch.randn(SHAPES[name]) for name in names.split()}
    for name, tensor in t.items():
        tensor.requires_grad_(name in trains.split())
    sizes = []
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
