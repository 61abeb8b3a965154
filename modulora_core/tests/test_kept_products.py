"""Products that are kept aren't made again, and gradients are those of before: the same bits, or nearly, in eight."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from modulora_core import offload
from modulora_core.adapters import LoRASettings, add_lora
from modulora_core.autograd import lora_linear
from modulora_core.checkpoint import load_model
from modulora_core.gradient_checkpointing import checkpoint_activations
from modulora_core.kept_products import Form, KeptProducts
from modulora_core.offload import DiskFile, offloaded_activations
from modulora_core.recomputation import checkpointed, recomputed

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

LAST_IS_NEEDED = {"gemma3_text", "gpt2"}
"""Where something behind a block's last product is saved for the backward: a norm's input, a dropout's mask."""


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
        assert multiplied[False] == BLOCKS * LINEARS[architecture] < without[False]
        assert multiplied[True] == without[True]


@pytest.mark.parametrize("form", ["exact", "rounded"])
@pytest.mark.parametrize("architecture", ["llama", "gemma3_text"])
def test_the_last_product_of_a_block_is_kept_as_long_as_it_may_be_needed(
    architecture: str, form: Form, pack: Pack, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: list[Tensor] = []
    keep = KeptProducts.keep
    monkeypatch.setattr(KeptProducts, "keep", lambda self, y: kept.append(y) or keep(self, y))
    model = adapted(pack(architecture, "toy")[1], form)
    counts = []
    for _ in range(3):
        kept.clear()
        step(model)
        counts.append(len(kept))
    whole = BLOCKS * LINEARS[architecture]
    later = whole if architecture in LAST_IS_NEEDED else whole - BLOCKS
    assert counts == [whole, later, later]


@pytest.mark.parametrize("architecture", LINEARS)
def test_none_are_kept_and_the_last_is_made_again_where_it_is_needed(
    architecture: str, pack: Pack, multiplied: Counter[bool]
) -> None:
    model = adapted(pack(architecture, "toy")[1], "none")
    for number in range(3):
        multiplied.clear()
        step(model)
        linears = LINEARS[architecture]
        repeated = BLOCKS * (linears if architecture in LAST_IS_NEEDED else linears - 1)
        # the first block that was repeated had no last product at first
        in_vain = linears - 1 if number == 0 and architecture in LAST_IS_NEEDED else 0
        assert multiplied[False] == BLOCKS * linears + repeated + in_vain


def test_blocks_below_what_trains_are_not_made_again_nor_gone_back_through(
    pack: Pack, multiplied: Counter[bool]
) -> None:
    model = adapted(pack("llama", "toy")[1], "none", targets="layers.1.self_attn.o_proj")
    step(model)
    # the block above makes all again but its last product; gradients go back through its feed-forward layers alone
    assert multiplied == {False: BLOCKS * LINEARS["llama"] + LINEARS["llama"] - 1, True: 3}


class Outer(GradientCheckpointingLayer):
    """A block around a block."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, hidden: Tensor, **keywords: Any) -> Any:
        return self.inner(hidden, **keywords)


def test_a_block_in_a_block_is_made_again_with_it(pack: Pack, multiplied: Counter[bool]) -> None:
    model = adapted(pack("llama", "toy")[1], "none")
    expected = step(model)
    model.model.layers = nn.ModuleList(map(Outer, model.model.layers))
    checkpoint_activations(model, products="exact")
    multiplied.clear()
    loss, gradients = step(model)
    assert loss == expected[0]
    assert all(map(torch.equal, gradients, expected[1]))
    assert multiplied[False] == BLOCKS * LINEARS["llama"]


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


class Block(nn.Module):
    """Three products, each with a step behind it."""

    def __init__(self, toy: ModuleType, step: Callable[[Tensor], Tensor] = torch.sin) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.quantizer, self.step = toy.Toy(), step
        self.weights = [self.quantizer.pack(torch.randn(40, 40, generator=generator) / 6) for _ in range(3)]
        self.A, self.B = (
            nn.Parameter(torch.randn(shape, generator=generator) / 6) for shape in ((2, 40), (40, 2))
        )
        self.x = torch.randn(5, 40, generator=generator).requires_grad_()

    def linear(self, x: Tensor, number: int) -> Tensor:
        return lora_linear(x, self.quantizer, self.weights[number], A=self.A, B=self.B)

    def forward(self, x: Tensor) -> Tensor:
        for number in range(3):
            x = self.step(self.linear(x, number))
        return x

    def gradients(self, y: Tensor) -> tuple[Tensor, ...]:
        first, again = (
            torch.autograd.grad(y.square().sum(), (self.x, self.A, self.B), retain_graph=True)
            for _ in range(2)
        )
        assert all(map(torch.equal, first, again)), "a graph that is kept goes back twice"
        return first


def _by_recomputation(block: Block, products: KeptProducts) -> Tensor:
    result: Tensor = recomputed(partial(block), (block.x,), list(block.parameters()), products)
    return result


def _by_torch(block: Block, products: KeptProducts) -> Tensor:
    result: Tensor = checkpointed(block, (block.x,), products)
    return result


ways = pytest.mark.parametrize("run", [_by_recomputation, _by_torch], ids=["recomputed", "torch"])
Run = Callable[[Block, KeptProducts], Tensor]


def keeping(form: Form) -> KeptProducts:
    """As after the first step of a block whose last product is needed."""
    products = KeptProducts(form)
    products.needs_last = True
    return products


class WritesToAnEarlierOne(Block):
    def forward(self, x: Tensor) -> Tensor:
        first = self.linear(x, 0)
        second = self.linear(first + 1, 1)
        first.mul_(2)
        return self.linear(first + second, 2).sin()


WRITERS = {
    "nothing": lambda toy: Block(toy),
    "each": lambda toy: Block(toy, lambda y: y.mul_(0.5).sin()),
    "an earlier one": WritesToAnEarlierOne,
}


@ways
@pytest.mark.parametrize(("written", "made"), [("nothing", 0), ("each", 3), ("an earlier one", 1)])
def test_a_product_that_was_written_to_is_made_again(
    run: Run, written: str, made: int, toy: ModuleType, multiplied: Counter[bool]
) -> None:
    block = WRITERS[written](toy)
    expected = block.gradients(block(block.x))
    multiplied.clear()
    assert all(map(torch.equal, block.gradients(run(block, keeping("exact"))), expected))
    assert multiplied[False] == 3 + 2 * made


@ways
def test_eight_bits_are_near_where_nothing_else_is_lost(run: Run, toy: ModuleType) -> None:
    block = Block(toy)
    found = block.gradients(run(block, keeping("rounded")))
    assert 1e-4 < difference(list(found), list(block.gradients(block(block.x)))) < 0.03


@ways
@pytest.mark.parametrize("form", ["exact", "rounded"])
def test_what_is_offloaded_is_the_same_and_not_here_too(
    run: Run, form: Form, toy: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(offload, "_SMALLEST", 5 * 40)  # bytes: codes wait elsewhere, and not their scales
    block = Block(toy)
    here = block.gradients(run(block, keeping(form)))
    handed_over: list[weakref.ref[Any]] = []
    with DiskFile(tmp_path) as file:
        keep = file.keep

        def noted(tensor: Tensor) -> Tensor:
            handed_over.append(weakref.ref(tensor.untyped_storage()))
            return keep(tensor)

        monkeypatch.setattr(file, "keep", noted)
        with offloaded_activations(block, file):
            y = run(block, keeping(form))
        alive = [storage() for storage in handed_over if storage() is not None]
        assert len(handed_over) == 1 + 3
        assert [storage.data_ptr() for storage in alive] == [block.x.untyped_storage().data_ptr()]
        assert all(map(torch.equal, block.gradients(y), here))


@ways
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_other_dtypes_are_kept_in_theirs(run: Run, dtype: torch.dtype, toy: ModuleType) -> None:
    block = Block(toy)
    block.x = block.x.detach().to(dtype).requires_grad_()
    expected = block.gradients(block(block.x))
    assert all(map(torch.equal, block.gradients(run(block, keeping("exact"))), expected))
    assert difference(list(block.gradients(run(block, keeping("rounded")))), list(expected)) < 0.03


def test_outside_of_a_block_nothing_is_kept(toy: ModuleType, multiplied: Counter[bool]) -> None:
    block = Block(toy)
    block.gradients(checkpoint(block, block.x, use_reentrant=False))  # type: ignore[arg-type]  # it returns what the block does
    assert multiplied[False] == 3 * 3, "the forward, and two repetitions"
