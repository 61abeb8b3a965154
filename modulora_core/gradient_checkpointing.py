"""Gradient checkpointing (Chen et al. 2016, arXiv 1604.06174): what a block computes is made again in the backward instead of kept.

A block is made again by :mod:`modulora_core.recomputation`, through which gradients pass by what the block returns. One that may hand on
more than that is left to torch's checkpointing, which takes more memory; and all others of its model with it, because one of them is
meant to find it.

Apart from :mod:`modulora_core.training`, whose Trainer takes a second and 100 MiB to import.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from modulora_core import kept_products
from modulora_core.kept_products import Form, KeptProducts
from modulora_core.recomputation import checkpointed, recomputed


def checkpoint_activations(model: PreTrainedModel, *, products: Form = "none") -> None:
    """Turn on gradient checkpointing.

    Args:
        products: how to keep the products with packed weights, which then aren't made again (:mod:`modulora_core.kept_products`);
            ``"none"`` keeps the inputs of blocks alone.
    """
    # transformers 5.24 renamed gradient_checkpointing_enable, and warns of the old name
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    # it has embeddings require gradients, so that all blocks go back, for a kind of checkpointing that wants that
    model.disable_input_require_grads()
    blocks = _Blocks(products)
    for module in model.modules():
        if hasattr(module, "_gradient_checkpointing_func"):
            module._gradient_checkpointing_func = blocks.run


class _Blocks:
    """The blocks of one model."""

    def __init__(self, form: Form) -> None:
        self._products = KeptProducts(form)
        self._are_closed = True

    def run(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """What transformers calls: with a block's forward, bound to the block and to keywords, and the other arguments."""
        if torch.compiler.is_compiling():  # it knows torch's own, and no products
            return checkpoint(function, *arguments, use_reentrant=False)
        if kept_products.is_inside():  # a part of a block that is made again as a whole
            return function(*arguments)
        call = function if isinstance(function, partial) else partial(function)
        block = _block_of(call)
        if (
            self._are_closed
            and block is not None
            and _is_closed(block, (*arguments, *call.keywords.values()))
        ):
            before = _attributes(block)
            parameters = [parameter for parameter in block.parameters() if parameter.requires_grad]
            outputs = recomputed(call, arguments, parameters, self._products)
            if _are_the_same(before, _attributes(block)):
                return outputs
        self._are_closed = False
        return checkpointed(function, arguments, self._products)


def _block_of(call: partial[Any]) -> nn.Module | None:
    """The module whose method is called."""
    bound = (*call.args, getattr(call.func, "__self__", None))
    return next((value for value in bound if isinstance(value, nn.Module)), None)


def _is_closed(block: nn.Module, arguments: Iterable[Any]) -> bool:
    """Whether nothing is seen, before it runs, by which it may hand on more than it returns: an argument to write to, a hook inside."""
    return all(map(_is_plain, arguments)) and not any(
        module._forward_hooks for module in block.modules() if module is not block
    )


def _is_plain(value: Any) -> bool:
    if isinstance(value, tuple):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, Tensor | bool | int | float | str | torch.dtype)


def _attributes(block: nn.Module) -> dict[tuple[int, str], Tensor]:
    """The tensors, neither parameters nor buffers, that the modules of a block refer to."""
    return {
        (number, name): value
        for number, module in enumerate(block.modules())
        for name, value in vars(module).items()
        if isinstance(value, Tensor)
    }


def _are_the_same(some: Mapping[Any, Tensor], others: Mapping[Any, Tensor]) -> bool:
    return some.keys() == others.keys() and all(some[key] is others[key] for key in some)
