"""Packed weights in the places of a model's parameters. Here PyTorch meets a quantizer.

    PackedParameter   a packed matrix: its tensors are frozen, moved but never cast
    PackedTable       the packed weight of an embedding, whose rows are decoded on request
    PackedStack       fused experts, [experts, out, in]: a list of PackedParameters
    HeadWeight        the packed weight of an output head as a tensor, whose rows are decoded too

The model's own code uses a packed weight like the tensor that it replaces. ``F.linear(x, W)``,
``x @ W``, ``torch.bmm(x, experts)``, ``F.embedding(ids, W)`` and ``W[rows]`` of a table or a head
reach the quantizer through torch's ``__torch_function__`` protocol. Any other use of a packed
weight as a tensor raises DenseWeightError, whose message names the attempt.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from itertools import chain
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from modulora_core.autograd import new_number, packed_lookup, packed_product
from modulora_core.errors import DenseWeightError, ModelError
from modulora_core.spec import PackedWeight, Quantizer
from modulora_core.tiles import tile_bytes, tile_ranges

_HALVES = (torch.float16, torch.bfloat16)
_PRODUCTS = (torch.matmul, torch.mm, Tensor.matmul, Tensor.mm, Tensor.__matmul__)
_FACTS = frozenset(
    ["shape", "dtype", "device", "layout", "ndim", "size", "dim", "numel", "nelement", "stride",
     "element_size", "is_floating_point", "is_complex", "is_contiguous", "requires_grad", "grad",
     "grad_fn", "is_leaf", "is_cuda", "is_meta", "is_sparse", "is_quantized", "__len__"]
)  # fmt: skip
"""Methods and properties of a tensor that need no values."""


class FrozenParameter(nn.Parameter):
    """A tensor of a packed weight, which can't train. Wider ``data`` is narrowed again.

    PEFT's prepare_model_for_kbit_training widens 16-bit parameters to fp32. Narrowing is exact.
    """

    @property
    def data(self) -> Tensor:
        return Tensor.data.__get__(self)  # type: ignore[attr-defined, no-any-return]

    @data.setter
    def data(self, data: Tensor) -> None:
        was_widened = data.dtype is torch.float32 and self.dtype in _HALVES
        Tensor.data.__set__(self, data.to(self.dtype) if was_widened else data)  # type: ignore[attr-defined]

    def requires_grad_(self, requires_grad: bool = True) -> Tensor:
        """Freeze it. True raises ModelError."""
        if requires_grad:
            raise ModelError(
                "requires_grad_(True), or PEFT's modules_to_save: expected dense weights, got a "
                "packed one, which can't train; train an adapter with add_lora or PEFT, leave the "
                "layer dense while quantizing, or call model.dequantize() first"
            )
        return super().requires_grad_(False)


class PackedParameter(nn.Module):
    """A packed weight in the place of a parameter.

    Its tensors are parameters without a gradient, since DDP broadcasts buffers at each forward and
    FSDP2 shards parameters alone. A 0-d tensor, which FSDP2 cannot shard, is a buffer.

    Args:
        quantizer: the quantizer that packed it.
        packed: Ŵ, ``[out, in]``; on the meta device for a skeleton that a loader fills.
        transposed: the model's code sees the weight as ``[in, out]`` and computes ``x @ W``.
        dtype: the dtype of the dense weight in its place, to which some models cast activations.
            ``model.to(dtype)`` changes it as it would change a dense weight.
    """

    def __init__(
        self, quantizer: Quantizer, packed: PackedWeight, *, transposed: bool = False,
        dtype: torch.dtype = torch.float32,
    ) -> None:  # fmt: skip
        super().__init__()
        self.dtype = dtype
        self.quantizer = quantizer
        self.layout = packed.layout
        self.transposed = transposed
        self.number = new_number(self)
        self._packed: PackedWeight | None = None
        for name, tensor in packed.tensors.items():
            if tensor.dim():
                self.register_parameter(name, FrozenParameter(tensor, requires_grad=False))
            else:
                self.register_buffer(name, tensor)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.number, self._packed = new_number(self), None  # it is a deep copy
        self._freeze()

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if isinstance(value, nn.Parameter):  # FSDP2 puts a shard in: nothing holds the whole tensor
            self._packed = None
            self._freeze()

    def _freeze(self) -> None:
        """Make frozen parameters of those that a loader, torch or pickle made.

        FSDP2 and loaders keep the object that they put in, so its class changes, not the object.
        """
        for parameter in self._parameters.values():
            if type(parameter) is nn.Parameter:
                parameter.__class__ = FrozenParameter

    @property
    def packed(self) -> PackedWeight:
        """The packed weight, made of the tensors as they are now.

        Cached as long as the tensors are the same, for decoding reads it once a layer and token.
        """
        tensors: dict[str, Any] = {**self._parameters, **self._buffers}
        known = self._packed
        if known is None or not all(map(operator.is_, tensors.values(), known.tensors.values())):
            known = self._packed = self.layout.fill(tensors)
        return known

    @property
    def shape(self) -> torch.Size:
        """The shape that the model's code sees."""
        return torch.Size(reversed(self.layout.shape) if self.transposed else self.layout.shape)

    @property
    def device(self) -> torch.device:
        return next(chain(self.parameters(False), self.buffers(False))).device

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The whole Ŵ, in the orientation that the model's code sees."""
        out = self.layout.shape[0]
        tile = self.quantizer.dequantize_tile(self.packed, (0, out), dtype)
        return tile.t().contiguous() if self.transposed else tile

    def multiply(self, x: Tensor, transpose: bool = False) -> Tensor:
        """``x Ŵᵀ``, or ``x Ŵ`` when ``transpose``; differentiable in ``x``."""
        return packed_product(x, self, transpose)

    def rows_at(self, index: Any) -> Tensor:
        """``Ŵ[index]``, decoded, ``[..., in]`` in ``dtype``, without a gradient.

        Args:
            index: an int, a slice, ids, or a mask of rows.

        Raises:
            IndexError: a row outside of Ŵ, or an index of columns.
        """
        count, width = self.layout.shape
        if not isinstance(index, slice) or index.step not in (None, 1):
            ids = torch.arange(count, device=self.device)[index]
            return packed_lookup(ids, self, self.dtype)
        start, stop, _ = index.indices(count)
        found = torch.empty(max(0, stop - start), width, dtype=self.dtype, device=self.device)
        with torch.no_grad():
            for a, b in tile_ranges(len(found), width * found.itemsize, tile_bytes(self.device)):
                tile = (start + a, start + b)
                found[a:b] = self.quantizer.dequantize_tile(self.packed, tile, self.dtype)
        return found

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=self.device)).dtype

        # model.half() casts every float buffer; scales keep the dtype that they were packed with
        def move(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        super()._apply(move, recurse)
        self._freeze()
        return self

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.linear:
            x, weight, bias = _linear_arguments(*args, **(kwargs or {}))
            if not isinstance(weight, Tensor):  # a PackedParameter, or one with an adapter
                y = weight.multiply(x, transpose=weight.transposed)
                return y if bias is None else y + bias
        if func in _PRODUCTS and not kwargs:
            x, weight = args
            if not isinstance(weight, Tensor):
                return weight.multiply(x, transpose=not weight.transposed)
        for each in (*args, *(kwargs or {}).values()):
            if isinstance(each, PackedParameter):
                raise each._refused(_name(func))
        return NotImplemented

    def extra_repr(self) -> str:
        out_features, in_features = self.layout.shape
        bits = f"{self.layout.bits_per_weight:.2f} bits per weight"
        return f"{self.layout.quantizer}, {out_features}x{in_features}, {bits}"

    # --- PEFT and a model's code take it for a tensor ---

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if hasattr(Tensor, name):
                raise self._refused(name) from None
            raise

    def __getitem__(self, rows: Any) -> Any:
        raise self._refused("rows")  # of an adapted head too: its rows alone lack the adapter

    def to(self, *where: Any, **more: Any) -> Any:
        """Move the tensors. A dtype, as PEFT's methods give to read W, raises ModelError."""
        if any(isinstance(each, torch.dtype) for each in (*where, *more.values())):
            raise self._refused("to(dtype)")
        return super().to(*where, **more)

    def _refused(self, tried: str) -> DenseWeightError:
        out_features, in_features = self.layout.shape
        return DenseWeightError(
            f"{tried} of a {out_features}x{in_features} weight packed by {self.layout.quantizer}: "
            "expected a product, or rows of an embedding or of an output head without an adapter; "
            "everything else needs a dense weight: call model.dequantize() first, merge an adapter "
            "with `modulora merge`, or use a method that does not read the weight, such as LoRA "
            "with its usual start"
        )


def _name(func: Any) -> str:
    """The name of a torch function, or of the property whose getter it is."""
    getter = getattr(func, "__name__", "") == "__get__"
    return str(getattr(func.__self__ if getter else func, "__name__", func))


def _linear_arguments(input: Any, weight: Any, bias: Any = None) -> tuple[Any, Any, Any]:
    return input, weight, bias


class PackedTable(PackedParameter):
    """The packed weight of an embedding: ``X = Ŵ[ids]``, without a gradient.

    The model's own ``nn.Embedding`` stays, since some models scale the rows. This module replaces
    its ``weight``, Ŵ ``[vocabulary, hidden]``. The rows have its ``dtype``.
    """

    def lookup(self, ids: Tensor) -> Tensor:
        """Rows ``ids``, ``[*ids.shape, hidden]``. Raises IndexError for an id outside the table."""
        return packed_lookup(ids, self, self.dtype)

    def __getitem__(self, rows: Any) -> Tensor:
        return self.rows_at(rows)

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


class HeadWeight(Tensor):
    """The packed weight of an output head as a tensor without storage, ``[vocabulary, hidden]``.

    TRL's losses read ``lm_head.weight[a:b]`` in a function of their own, and save the weight for
    the backward, which only a tensor can be. Rows are decoded when they are read. They are
    constants: hidden states that they multiply get their gradient, and the weight gets none.

    Args:
        parameter: the packed weight. It must not be transposed.
    """

    parameter: PackedParameter

    @staticmethod
    def __new__(cls, parameter: PackedParameter) -> HeadWeight:
        weight: HeadWeight = Tensor._make_wrapper_subclass(
            cls, parameter.shape, dtype=parameter.dtype, device=parameter.device
        )
        weight.parameter = parameter
        return weight

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = _name(func), kwargs or {}
        if name in _FACTS:
            return super().__torch_function__(func, types, args, kwargs)
        weight, others = args[0] if args else None, args[1:]
        if isinstance(weight, HeadWeight):
            if name == "__getitem__":
                return weight.parameter.rows_at(*others)
            if name == "requires_grad_":
                weight.parameter.requires_grad_(*others, **kwargs)
                return weight
            if name == "to":  # a tensor that is there already, in that dtype, is itself
                like = torch.empty(0, dtype=weight.dtype, device=weight.device)
                if like.to(*others, **kwargs) is like:
                    return weight
        args = [each.parameter if isinstance(each, HeadWeight) else each for each in args]
        kwargs = {
            key: each.parameter if isinstance(each, HeadWeight) else each
            for key, each in kwargs.items()
        }
        return PackedTable.__torch_function__(func, types, args, kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        raise next(each for each in args if isinstance(each, HeadWeight)).parameter._refused(
            str(func)
        )

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"HeadWeight({self.parameter.extra_repr()})"


class PackedStack(nn.ModuleList):
    """The packed matrices of a 3-D parameter, indexed by an int or a 0-d tensor.

    Args:
        matrices: a PackedParameter for each expert, of one shape.
        position: the position of the dense parameter among the parameters of its module.
    """

    def __init__(self, matrices: Iterable[nn.Module], position: int = 0) -> None:
        super().__init__(matrices)
        self.position = position

    @property
    def first(self) -> PackedParameter:
        """The matrix of expert 0, without an adapter. All have its shape."""
        return self.get_submodule("0")  # type: ignore[return-value]

    @property
    def shape(self) -> torch.Size:
        """The shape that the model's code sees."""
        return torch.Size((len(self), *self.first.shape))

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.bmm and not kwargs and isinstance(args[1], PackedStack):
            x, stack = args  # x: [experts, n, rows of each matrix as the model sees it]
            return torch.stack([part @ stack[i] for i, part in enumerate(x)])
        return NotImplemented


def check_scales(model: nn.Module, path: str = "", skip: tuple[str, ...] = ()) -> None:
    """Refuse packed weights whose scales are NaN or infinite: they would decode to zeros.

    Weights whose path begins with one of ``skip`` are left out.

    Raises:
        CheckpointError: a scale is NaN or infinite; the message begins with ``path`` and the name.
    """
    for name, module in model.named_modules():
        if not isinstance(module, PackedParameter) or name.startswith(skip):
            continue
        if module.device.type != "meta":
            module.quantizer.check_values(module.packed, f"{path}{name}")
