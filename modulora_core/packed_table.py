"""The input embedding as a packed table whose rows are decoded when they are looked up, and a head tied to it.

    X = Ŵ[ids]      Ŵ : [vocabulary, hidden], frozen, packed      ids : [...]      X : [..., hidden]
    Z = H Ŵᵀ + b    the head of a model whose config ties it to the embedding, by the same Ŵ

The model's own ``nn.Embedding`` stays, as some scale what they look up: a :class:`PackedTable` stands in the place of its ``weight``,
and ``F.embedding(ids, weight)`` reaches it through torch's ``__torch_function__`` protocol. There is no gradient: Ŵ is frozen, and ids
have none.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn

from modulora_core.autograd import lora_linear
from modulora_core.errors import ModelError
from modulora_core.layers import PackedParameter, QuantLinear
from modulora_core.spec import PackedWeight, Quantizer


class PackedTable(PackedParameter):
    """A packed weight in the place of an embedding's.

    Args:
        quantizer: what packed it.
        packed: Ŵ, ``[vocabulary, hidden]``.
        dtype: of the rows that are looked up; it follows ``model.to(dtype)`` as a dense weight's would.
    """

    def __init__(self, quantizer: Quantizer, packed: PackedWeight, dtype: torch.dtype) -> None:
        super().__init__(quantizer, packed)
        self.dtype = dtype

    def lookup(self, ids: Tensor) -> Tensor:
        """Rows ``ids``, ``[*ids.shape, hidden]``. Raises IndexError for an id that the table hasn't."""
        if torch.compiler.is_compiling():  # it can't know how many distinct ids there are
            from modulora_core.uncompiled import uncompiled

            return uncompiled(self.quantizer.lookup, ids, self.packed, self.dtype)  # type: ignore[no-any-return]  # the decorator has no types
        return self.quantizer.lookup(ids, self.packed, self.dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=self.device)).dtype
        super()._apply(fn, recurse)
        return self

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func is torch.nn.functional.embedding:
            ids, table, max_norm = _embedding_arguments(*args, **dict(kwargs or {}))
            if max_norm is not None:
                raise ModelError(
                    f"embedding of {max_norm=}: expected none, as a packed table can't be changed"
                )
            if isinstance(table, PackedTable):
                return table.lookup(ids)
        return super().__torch_function__(func, types, args, kwargs)


def _embedding_arguments(
    input: Any, weight: Any, padding_idx: Any = None, max_norm: Any = None, *_: Any, **__: Any
) -> tuple[Any, Any, Any]:
    """What changes a lookup; the rest, ``padding_idx`` too, concerns gradients alone."""
    del padding_idx
    return input, weight, max_norm


class TiedHead(QuantLinear):
    """The output head of a model whose input embedding is the same packed table.

    The table is a part of the embedding: this module has a reference to it and no tensors of its own but the bias, so that the table is
    stored, moved and counted once.
    """

    def __init__(self, table: PackedTable, bias: nn.Parameter | None = None) -> None:
        super().__init__(table, bias)
        del self._modules["weight"]
        self.__dict__["weight"] = table  # past nn.Module, which would take it for a part of this one

    def forward(self, x: Tensor) -> Tensor:
        return lora_linear(x, self.weight.quantizer, self.weight.packed, self.bias)


def install_table(model: nn.Module, path: str, table: PackedTable) -> None:
    """Put ``table`` into the embedding at ``path``, and into the heads that the model ties to it.

    Args:
        model: a transformers model.

    Raises:
        ModelError: there is no ``nn.Embedding``, or something else than a linear layer is tied to it.
    """
    embedding = model.get_submodule(path)
    if not isinstance(embedding, nn.Embedding):
        raise ModelError(
            f"{path}: expected an nn.Embedding for a packed table, got {type(embedding).__name__}"
        )
    for head in _untie(model, f"{path}.weight"):
        linear = model.get_submodule(head)
        if not isinstance(linear, nn.Linear):
            raise ModelError(
                f"{head}: tied to the packed table of {path}, expected nn.Linear, got {type(linear).__name__}"
            )
        tied = TiedHead(table, linear.bias)
        tied._is_hf_initialized = True  # type: ignore[assignment]  # transformers' mark: not to be filled with noise
        model.set_submodule(head, tied)
    del embedding._parameters["weight"]
    table._is_hf_initialized = True  # type: ignore[assignment]  # see above; the embedding itself may have buffers to be computed
    embedding.add_module("weight", table)


def _untie(model: Any, parameter: str) -> list[str]:
    """Paths of the modules whose weight is tied to ``parameter``; transformers forgets these ties, as there are no parameters to tie."""
    ties: dict[str, str] = dict(getattr(model, "all_tied_weights_keys", {}))
    tied = [name for name, other in ties.items() if other == parameter]
    left = {name: other for name, other in ties.items() if name not in tied}
    model.all_tied_weights_keys = left
    model._tied_weights_keys = left  # of this object: the class's own stay
    return [name.rpartition(".")[0] for name in tied]
