"""Products that are kept aren't made again, and gradients are those of before: the same bits, or nearly, in eight."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from modulora_core.adapters import LoRASettings, add_lora
from modulora_core.autograd import lora_linear
from modulora_core.blockwise import Blockwise
from modulora_core.checkpoint import load_model
from modulora_core.gradient_checkpointing import checkpoint_activations
from modulora_core.kept_products import Form, KeptProducts
from modulora_core.offload import DiskFile

pytestmark = pytest.mark.usefixtures("one_thread")

Pack = Callable[..., tuple[Path, Path]]


@pytest.fixture
def multiplied(toy: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Counter[bool]:
    """How often weights were multiplied by: forward under False, transposed under True."""
    counts: Counter[bool] = Counter()
    matmul = toy.Toy.matmul

    def counted(self: Any, x: Tensor, packed: Any, transpose: bool = False) -> Tensor:
        counts[transpose] += 1
        return matmul(self, x, packed, transpose)

    monkeypatch.setattr(toy.Toy, "matmul", counted)
    return counts


def step(model: Any) -> tuple[float, list[Tensor]]:
    """The loss, and the gradients of all that trains."""
    torch.manual_seed(4)  # of a model's own dropout
    ids = torch.randint(3, 60, (2, 24), generator=torch.Generator().manual_seed(5))
    loss = model.train()(ids, labels=ids).loss
    loss.backward()
    gradients = []
    for parameter in model.parameters():
        if parameter.requires_grad:
            gradients.append(parameter.grad.clone())
            parameter.grad = None
    return loss.item(), gradients


def adapted(folder: Path, products: Any, **options: Any) -> Any:
    """A packed model with an adapter whose B isn't zero."""
    torch.manual_seed(0)
    model = load_model(folder)
    add_lora(model, LoRASettings(rank=2, dropout=0.0, **options))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad and parameter.dim() == 2:
                parameter.add_(torch.randn_like(parameter) / 8)
    model.config.use_cache = False
    checkpoint_activations(model, products=products)
    return model


def difference(found: list[Tensor], expected: list[Tensor]) -> float:
    squares = sum(float((a - b).square().sum()) for a, b in zip(found, expected, strict=True))
    return float((squares / sum(float(b.square().sum()) for b in expected)) ** 0.5)


BLOCKS = 2
LINEARS = {"llama": 7, "gemma3_text": 7, "gpt2": 4, "phi": 6}
"""Packed layers of a block."""

LAST_IS_NEEDED = {"gemma3_text"}
"""Where a norm behind a block's last product needs it in the backward."""


@pytest.mark.parametrize("train_scales", [False, True], ids=["adapter", "and scales"])
@pytest.mark.parametrize("architecture", LINEARS)
def test_exact_ones_give_the_same_bits_and_are_not_made_again(
    architecture: str, train_scales: bool, pack: Pack, multiplied: Counter[bool]
) -> None:
    _, folder = pack(architecture, "toy")
    expected = step(adapted(folder, "none", train_scales=train_scales))
    without = multiplied.copy()
    model = adapted(folder, "exact", train_scales=train_scales)
    for number in range(3):
        multiplied.clear()
        loss, gradients = step(model)
        assert loss == expected[0]
        assert all(map(torch.equal, gradients, expected[1])), f"step {number}"
    assert multiplied[True] == without[True]
    assert multiplied[False] == BLOCKS * LINEARS[architecture] < without[False]


@pytest.mark.parametrize("form", ["exact", "rounded"])
@pytest.mark.parametrize("architecture", ["llama", "gemma3_text"])
def test_the_last_product_of_a_block_is_kept_as_long_as_it_may_be_needed(
    architecture: str, form: Form, pack: Pack, multiplied: Counter[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: list[Tensor] = []
    keep = KeptProducts.kept
    monkeypatch.setattr(KeptProducts, "kept", lambda self, y: kept.append(y) or keep(self, y))
    model = adapted(pack(architecture, "toy")[1], form)
    counts = []
    for _ in range(3):
        kept.clear()
        multiplied.clear()
        step(model)
        assert multiplied[False] == BLOCKS * LINEARS[architecture]
        counts.append(len(kept))
    whole = BLOCKS * LINEARS[architecture]
    assert counts == (
        [whole] * 3 if architecture in LAST_IS_NEEDED else [whole, whole - BLOCKS, whole - BLOCKS]
    )


@pytest.mark.parametrize("architecture", LINEARS)
def test_in_eight_bits_the_loss_is_exact_and_gradients_are_near(architecture: str, pack: Pack) -> None:
    _, folder = pack(architecture, "toy")
    expected = step(adapted(folder, "none"))
    model = adapted(folder, "rounded")
    first, again = step(model), step(model)
    assert first[0] == expected[0]
    assert all(map(torch.equal, first[1], again[1])), "the same in the first step and those after it"
    # a step of a block is 1/127 of its largest: about one per cent of a normal value, in each of a few products
    assert 1e-4 < difference(first[1], expected[1]) < 0.03


class Block:
    """Three products, each with a step behind it."""

    def __init__(self, toy: ModuleType, step: Callable[[Tensor], Tensor] = torch.sin) -> None:
        generator = torch.Generator().manual_seed(1)
        self.quantizer, self.step = toy.Toy(), step
        self.weights = [self.quantizer.pack(torch.randn(40, 40, generator=generator) / 6) for _ in range(3)]
        self.A, self.B = (
            (torch.randn(shape, generator=generator) / 6).requires_grad_() for shape in ((2, 40), (40, 2))
        )
        self.x = torch.randn(5, 40, generator=generator).requires_grad_()

    def linear(self, x: Tensor, number: int) -> Tensor:
        return lora_linear(x, self.quantizer, self.weights[number], A=self.A, B=self.B)

    def __call__(self, x: Tensor) -> Tensor:
        for number in range(3):
            x = self.step(self.linear(x, number))
        return x

    def gradients(self, kept: KeptProducts | None) -> tuple[Tensor, ...]:
        options: dict[str, Any] = {} if kept is None else {"context_fn": kept}
        y: Any = checkpoint(self, self.x, use_reentrant=False, **options)
        first, again = (
            torch.autograd.grad(y.square().sum(), (self.x, self.A, self.B), retain_graph=True)
            for _ in range(2)
        )
        assert all(map(torch.equal, first, again)), "a graph that is kept goes back twice"
        return first


class WritesToAnEarlierOne(Block):
    def __call__(self, x: Tensor) -> Tensor:
        first = self.linear(x, 0)
        second = self.linear(first + 1, 1)
        first.mul_(2)
        return self.linear(first + second, 2)


WRITERS = {
    "nothing": lambda toy: Block(toy),
    "each": lambda toy: Block(toy, lambda y: y.mul_(0.5).sin()),
    "an earlier one": WritesToAnEarlierOne,
}


@pytest.mark.parametrize(
    ("written", "place", "made"),
    [
        ("nothing", False, 0),
        ("nothing", True, 0),
        ("each", False, 3),
        ("each", True, 3),
        ("an earlier one", False, 1),
        ("an earlier one", True, 0),  # what is in the file was written there before
    ],
)
def test_a_product_that_was_written_to_is_made_again(
    written: str, place: bool, made: int, toy: ModuleType, multiplied: Counter[bool], tmp_path: Path
) -> None:
    block = WRITERS[written](toy)
    expected = block.gradients(None)
    with DiskFile(tmp_path) as file:
        kept = KeptProducts("exact", file if place else None)
        multiplied.clear()
        assert all(map(torch.equal, block.gradients(kept), expected))
        assert multiplied[False] == 3 + 2 * made
        assert (file.nbytes > 0) == (place and made < 3)


def test_eight_bits_wait_elsewhere_with_the_same_values(toy: ModuleType, tmp_path: Path) -> None:
    block = Block(toy)
    here = block.gradients(KeptProducts("rounded"))
    with DiskFile(tmp_path) as file:
        assert all(map(torch.equal, block.gradients(KeptProducts("rounded", file)), here))
        assert file.nbytes > 0
    assert 1e-4 < difference(list(here), list(block.gradients(None))) < 0.03


@pytest.mark.parametrize("form", ["exact", "rounded"])
def test_what_waits_elsewhere_is_not_here_too(
    form: Form, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    handed_over: list[weakref.ref[Tensor]] = []
    with DiskFile(tmp_path) as file:
        keep = file.keep
        monkeypatch.setattr(
            file, "keep", lambda tensor: handed_over.append(weakref.ref(tensor)) or keep(tensor)
        )
        product = torch.randn(64, 2048)
        expected = product.clone() if form == "exact" else Blockwise.quantize(product).dequantize()
        again = KeptProducts(form, file).kept(product)
        del product
        assert [tensor() for tensor in handed_over] == [None]
        found = again()
        assert found is not None
        assert torch.equal(found, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_other_dtypes_are_kept_in_theirs(dtype: torch.dtype, toy: ModuleType) -> None:
    block = Block(toy)
    block.x = block.x.detach().to(dtype).requires_grad_()
    expected = block.gradients(None)
    assert all(map(torch.equal, block.gradients(KeptProducts("exact")), expected))
    assert difference(list(block.gradients(KeptProducts("rounded"))), list(expected)) < 0.03


def test_outside_of_a_block_that_keeps_them_nothing_is_kept(
    toy: ModuleType, multiplied: Counter[bool]
) -> None:
    block = Block(toy)
    block.gradients(None)
    assert multiplied[False] == 3 * 3, "the forward, and two repetitions"
