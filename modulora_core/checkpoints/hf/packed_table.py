"""The packed weight of an embedding, and an output head that shares it.

    PackedTable   the weight of an ``nn.Embedding``; its rows are decoded when they are looked up
    TiedHead      an output head that shares the PackedTable of the embedding

``F.embedding(ids, W)`` in the model's code reaches the quantizer through torch's
``__torch_function__`` protocol.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from modulora_core.autograd import WEIGHTS
from modulora_core.errors import ModelError
from modulora_core.layers import PackedParameter, QuantLinear


class PackedTable(PackedParameter):
    """The packed weight of an embedding: ``X = Ŵ[ids]``, without a gradient.

    The model's own ``nn.Embedding`` stays, since some models scale the rows. This module replaces
    its ``weight``, Ŵ ``[vocabulary, hidden]``. The rows have its ``dtype``.
    """

    def lookup(self, ids: Tensor) -> Tensor:
        """Rows ``ids``, ``[*ids.shape, hidden]``. Raises IndexError for an id outside the table."""
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            rows: Tensor = torch.ops.modulora.lookup(ids, self.number, self.dtype)
            return rows
        return self.quantizer.lookup(ids, self.packed, self.dtype)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.embedding:
            ids, table, max_norm = _embedding_arguments(*args, **(kwargs or {}))
            if max_norm is not None:
                raise ModelError(
                    f"embedding: expected max_norm=None for a packed table, got {max_norm}"
                )
            if isinstance(table, PackedTable):
                return table.lookup(ids)
        return super().__torch_function__(func, types, args, kwargs)


def _embedding_arguments(
    input: Any, weight: Any, padding_idx: Any = None, max_norm: Any = None, *_: Any, **__: Any
) -> tuple[Any, Any, Any]:
    del padding_idx  # it and the others concern gradients
    return input, weight, max_norm


def _lookup(ids: Tensor, number: int, dtype: torch.dtype) -> Tensor:
    table = WEIGHTS[number]
    return table.quantizer.lookup(ids, table.packed, dtype)


def _empty_rows(ids: Tensor, number: int, dtype: torch.dtype) -> Tensor:
    return ids.new_empty(*ids.shape, WEIGHTS[number].layout.shape[1], dtype=dtype)


_LIBRARY = torch.library.Library("modulora", "FRAGMENT")
_LIBRARY.define("lookup(Tensor ids, int weight, ScalarType dtype) -> Tensor")
_LIBRARY.impl("lookup", _lookup, "CompositeExplicitAutograd")
torch.library.register_fake("modulora::lookup", _empty_rows, lib=_LIBRARY)


class TiedHead(QuantLinear):
    """The output head of a model whose input embedding is the same packed table.

    It refers to the table and does not own it, so the table is stored, moved and counted once.
    """

    def __init__(self, table: PackedTable, bias: nn.Parameter | None = None) -> None:
        super().__init__(table, bias)
        del self._modules["weight"]
        self.__dict__["weight"] = table  # an assignment would register it as a submodule
