"""A part of a model as one node of autograd's graph: it runs without recording anything, and in the backward once more, recorded.

    forward    y = f(x, θ)                  x is kept, and what kept_products.py keeps of the products in f
    backward   dx, dθ                       of f(x, θ), made again

torch's checkpointing records all of f in its forward too, with a holder in the place of each tensor that f saves. These are small, but
live until the backward, and lie between the large tensors that come and go meanwhile: the C library then finds no room between them for
the next large ones (docs/performance-findings.md, What of a step's peak is holes in the heap). Its other kind, which records nothing,
accumulates gradients wherever they are, and only into leaves. This one is a function of x and θ: ``torch.autograd.grad`` goes through it,
and a graph that is kept goes back more than once.

Gradients reach f by what it returns alone; for what hands on more there is :func:`checkpointed`. What f's code decides by values behind
its last product, it decides by zeros the second time (:mod:`modulora_core.kept_products`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten
from torch.utils.checkpoint import checkpoint, get_device_states, set_device_states

from modulora_core.kept_products import KeptProducts, Making, Record, Repeating


def recomputed(
    call: partial[Any], arguments: Sequence[Any], parameters: Sequence[nn.Parameter], products: KeptProducts
) -> Any:
    """``call(*arguments)``, made again in the backward.

    Args:
        call: tensors that are bound to it are referred to, or kept where they require a gradient.
        arguments: tensors among them are kept, as autograd keeps what it saves: hooks on saved tensors see them.
        parameters: all that ``call`` trains.
        products: how packed products in it are kept.

    Returns:
        What it returns, of any structure, differentiable once in all of these.
    """
    leaves, structure = tree_flatten((tuple(arguments), call.args, call.keywords))
    positional = len(tree_leaves(tuple(arguments)))
    places = [
        place
        for place, leaf in enumerate(leaves)
        if isinstance(leaf, Tensor) and (place < positional or leaf.requires_grad)
    ]
    function = _Function(call.func, structure, dict(enumerate(leaves)), places)
    tensors = [function.others.pop(place) for place in places]
    outputs = _Recomputed.apply(function, products, *tensors, *parameters)
    return tree_unflatten(outputs, function.returned)


class _Function:
    """A function of some tensors alone.

    Args:
        function: what is called.
        structure: of its arguments, its bound ones, and its keywords.
        others: what isn't given later, by its place among the leaves.
        places: of the tensors.

    Attributes:
        returned: the structure of what was returned last.
    """

    def __init__(
        self, function: Callable[..., Any], structure: Any, others: dict[int, Any], places: Sequence[int]
    ) -> None:
        self._function, self._structure = function, structure
        self.others, self.places = others, places
        self.returned: Any = None

    def __call__(self, tensors: Sequence[Tensor]) -> tuple[Any, ...]:
        leaves = self.others | dict(zip(self.places, tensors, strict=True))
        arguments, bound, keywords = tree_unflatten(
            [leaves[place] for place in sorted(leaves)], self._structure
        )
        outputs, self.returned = tree_flatten(self._function(*bound, *arguments, **keywords))
        return tuple(outputs)


class _Recomputed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, function: _Function, products: KeptProducts, *tensors: Tensor) -> tuple[Any, ...]:
        ctx.count = len(function.places)
        inputs, ctx.parameters = tensors[: ctx.count], tensors[ctx.count :]
        ctx.function, ctx.products, ctx.surroundings = function, products, _Surroundings(inputs)
        with Making(products) as making:
            outputs = function(inputs)
        kept, ctx.record = making.record()
        ctx.save_for_backward(*inputs, *kept)
        ctx.set_materialize_grads(False)
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        needed = ctx.needs_input_grad[2:]
        inputs, results = _repeated(ctx, needed)
        pairs = [
            (output, gradient)
            for output, gradient in zip(results, gradients, strict=True)
            if gradient is not None and output.requires_grad
        ]
        wanted = [number for number, needs in enumerate(needed) if needs]
        found: list[Tensor | None] = [None] * len(needed)
        if pairs:
            outputs, dY = zip(*pairs, strict=True)
            leaves = [*inputs, *ctx.parameters]
            of_leaves = torch.autograd.grad(outputs, [leaves[n] for n in wanted], dY, allow_unused=True)
            for number, gradient in zip(wanted, of_leaves, strict=True):
                found[number] = gradient
        return None, None, *found


def _repeated(ctx: Any, needed: Sequence[bool]) -> tuple[list[Tensor], tuple[Any, ...]]:
    """The function's inputs, as leaves of a graph, and once more its outputs, recorded."""
    saved = ctx.saved_tensors  # once: what waits elsewhere is brought each time
    inputs = [
        tensor.detach().requires_grad_(needs)
        for tensor, needs in zip(saved[: ctx.count], needed, strict=False)
    ]

    while True:
        with (
            Repeating(ctx.products, saved[ctx.count :], ctx.record) as repeating,
            ctx.surroundings.again(),
            torch.enable_grad(),
        ):
            outputs: tuple[Any, ...] = ctx.function(inputs)
        if not repeating.was_in_vain:
            return inputs, outputs
        del outputs


class _Surroundings:
    """What a function finds beside its arguments: the states of torch's random generators, and autocast."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._device = next((tensor.device.type for tensor in tensors if not tensor.is_cpu), "cpu")
        self._on_cpu = torch.get_rng_state()
        self._devices, self._on_devices = get_device_states(*tensors)
        self._autocast = [
            torch.autocast(
                device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device), torch.is_autocast_cache_enabled()
            )
            for device in dict.fromkeys(("cpu", self._device)) if torch.amp.is_autocast_available(device)
        ]  # fmt: skip

    @contextmanager
    def again(self) -> Iterator[None]:
        """As they were; afterwards as they are now."""
        with (
            torch.random.fork_rng(self._devices, device_type=self._device),
            ExitStack() as stack,
        ):
            torch.set_rng_state(self._on_cpu)
            set_device_states(self._devices, self._on_devices, device_type=self._device)
            for autocast in self._autocast:
                stack.enter_context(autocast)
            yield


def checkpointed(call: Callable[..., Any], arguments: Sequence[Any], products: KeptProducts) -> Any:
    """``call(*arguments)`` by torch's checkpointing, and products are kept: for what hands on more than it returns.

    Hooks on saved tensors see the products that are kept.
    """
    products.needs_last = True  # torch asks for what is needed alone
    forward = Making(products)
    repetition = _Repetition(products)
    result: Any = checkpoint(call, *arguments, use_reentrant=False, context_fn=lambda: (forward, repetition))
    repetition.save(*forward.record())
    return result


class _Repetition(AbstractContextManager[None]):
    """A :class:`Repeating` of what was saved, each time that it is entered."""

    def __init__(self, products: KeptProducts) -> None:
        self._products = products

    def save(self, tensors: Sequence[Tensor], record: Record) -> None:
        self._record = record
        # a node of no graph
        self._saved = _Saved.apply(torch.empty(0, requires_grad=True), *tensors)

    def __enter__(self) -> None:
        self._current = Repeating(self._products, self._saved.grad_fn.saved_tensors, self._record)
        self._current.__enter__()

    def __exit__(self, *error: object) -> None:
        self._current.__exit__(*error)
        del self._current


class _Saved(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, nothing: Tensor, *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(*tensors)
        return nothing.clone()

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> None:  # noqa: ARG004  # it is in no graph
        raise AssertionError
