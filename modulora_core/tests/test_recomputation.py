"""A function that is made again in the backward has the values, the gradients and the random numbers that it has without."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from modulora_core.kept_products import KeptProducts
from modulora_core.recomputation import recomputed

pytestmark = pytest.mark.usefixtures("one_thread")


class Outputs(NamedTuple):
    hidden: Tensor
    more: dict[str, Any]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
        self.unused = nn.Parameter(torch.ones(3))
        self.frozen = nn.Parameter(torch.randn(8), requires_grad=False)

    def forward(self, x: Tensor, *others: Any, gate: Tensor, shift: float = 0.0) -> Outputs:
        y = F.dropout(torch.tanh(self.first(x)), 0.25) * gate + shift
        count = torch.tensor(others[0].numel() if others else 0)
        return Outputs(
            self.second(y) + self.frozen, {"y": y, "none": None, "count": count, "word": "as it is"}
        )


def plain(call: partial[Any], *arguments: Any) -> Any:
    return call(*arguments)


def again(call: partial[Any], *arguments: Any) -> Any:
    trained = [parameter for parameter in call.func.parameters() if parameter.requires_grad]
    return recomputed(call, arguments, trained, KeptProducts("none"))


Run = Callable[..., Any]


def leaves(*, x_trains: bool = True, gate_trains: bool = True) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    return (
        torch.randn(5, 8, generator=generator).requires_grad_(x_trains),
        torch.randn(5, 8, generator=generator).requires_grad_(gate_trains),
    )


@pytest.mark.parametrize("gate_trains", [True, False])
@pytest.mark.parametrize("x_trains", [True, False])
def test_values_gradients_and_random_numbers_are_those_without(x_trains: bool, gate_trains: bool) -> None:
    told = []
    for run in (plain, again):
        block, (x, gate) = Block(), leaves(x_trains=x_trains, gate_trains=gate_trains)
        torch.manual_seed(3)
        out = run(partial(block, gate=gate, shift=0.5), x, torch.ones(2, dtype=torch.int64))
        between = torch.rand(4)
        (out.hidden.square().sum() + out.more["y"].sum()).backward()
        gradients = [leaf.grad for leaf in (x, gate, *block.parameters())]
        told.append((out, between, torch.rand(4), gradients))
    (expected, *_), (found, *_) = told
    assert isinstance(found, Outputs)
    assert found.more.keys() == expected.more.keys()
    assert (found.more["none"], found.more["word"], int(found.more["count"])) == (None, "as it is", 2)
    for first, second in zip((told[0][1:3]), (told[1][1:3]), strict=True):
        assert torch.equal(first, second), "random numbers after the forward, and after the backward"
    for one, other in zip(told[0][3], told[1][3], strict=True):
        assert (one is None and other is None) or torch.equal(one, other)
    assert (told[1][3][0] is not None, told[1][3][1] is not None) == (x_trains, gate_trains)


def test_gradients_are_returned_to_who_asks_for_them() -> None:
    found = []
    for run in (plain, again):
        block, (x, gate) = Block(), leaves()
        torch.manual_seed(3)
        y = run(partial(block, gate=gate), x).hidden.sum()
        for _ in range(2):  # a graph that is kept
            found.append(torch.autograd.grad(y, (x, block.first.weight), retain_graph=True))
        assert x.grad is None
        assert block.first.weight.grad is None
    for gradients in found[1:]:
        assert all(map(torch.equal, gradients, found[0]))


def test_an_output_that_gets_no_gradient_gives_none() -> None:
    found = []
    for run in (plain, again):
        block, (x, gate) = Block(), leaves()
        torch.manual_seed(3)
        run(partial(block, gate=gate), x).more["y"].sum().backward()
        assert block.second.weight.grad is None
        found.append((x.grad, block.first.weight.grad))
    assert all(map(torch.equal, *found))


def test_where_nothing_trains_nothing_is_kept() -> None:
    block, (x, gate) = Block().requires_grad_(False), leaves(x_trains=False, gate_trains=False)
    assert not again(partial(block, gate=gate), x).hidden.requires_grad


def test_only_positional_inputs_and_what_trains_is_saved_and_one_node_recorded() -> None:
    block, (x, gate) = Block(), leaves(gate_trains=False)
    saved: list[int] = []
    asked_for: list[int] = []

    def noted(where: list[int]) -> Callable[[Tensor], Tensor]:
        def note(tensor: Tensor) -> Tensor:
            where.append(tensor.data_ptr())
            return tensor

        return note

    with torch.autograd.graph.saved_tensors_hooks(noted(saved), noted(asked_for)):
        y = again(partial(block, gate=gate), x).hidden
    assert saved == [x.data_ptr()]
    behind = {type(node).__name__ for node, _ in y.grad_fn.next_functions if node is not None}
    assert behind == {"AccumulateGrad"}
    y.sum().backward()
    assert asked_for == [x.data_ptr()], "once: it may wait in a file"


@pytest.mark.parametrize("now", [True, False], ids=["off, then on", "on, then off"])
def test_autocast_is_what_it_was(now: bool) -> None:
    told = []

    class Tells(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            y = super().forward(x)
            told.append(y.dtype)
            return y.float()

    block, x = Tells(4, 4), torch.randn(3, 4)
    with torch.autocast("cpu", torch.bfloat16, enabled=not now):
        y = again(partial(block), x)
    with torch.autocast("cpu", torch.bfloat16, enabled=now):
        y.sum().backward()
        assert torch.is_autocast_enabled("cpu") == now
    assert told == [torch.float32 if now else torch.bfloat16] * 2


def test_an_input_that_was_written_to_is_refused() -> None:
    block, (x, gate) = Block(), leaves(x_trains=False)
    y = again(partial(block, gate=gate), x).hidden
    x.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
