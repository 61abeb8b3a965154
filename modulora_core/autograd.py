"""The packed product and its gradient (ModuLoRA, arXiv 2309.16119, section 3).

    forward    Y  = X Ŵᵀ + s · (X Aᵀ) Bᵀ      X : [n, in]   Ŵ : [out, in], frozen, packed
    backward   dX = dY Ŵ + s · (dY B) A       A : [r, in]   B : [out, r]   dY : [n, out]
               dA = s · (dY B)ᵀ X
               dB = s · dYᵀ (X Aᵀ)

The quantizer is a black box: its ``matmul`` gives X Ŵᵀ in the forward and dY Ŵ in the backward.
:func:`packed_product` is that one differentiable operation. It saves no tensor: the backward needs
Ŵ alone, and asks the quantizer for it again. The adapter is ordinary torch, so autograd saves X,
X Aᵀ, A and B for it. Channel scales, ``Y = v ⊙ ((X ⊙ u) Ŵᵀ)``, are ordinary torch too.

:func:`lora_linear` computes the adapter *before* the product. Gradient checkpointing recomputes a
block until it has every saved tensor. A block's last product saves none, so torch skips it.
"""

from __future__ import annotations

from itertools import count
from typing import Any, Protocol
from weakref import WeakValueDictionary

import torch
from torch import Tensor
from torch.nn import functional as F

from modulora_core.dense_products import compute_dtype
from modulora_core.errors import ShapeError, note_plugin
from modulora_core.spec import PackedLayout, PackedWeight, Quantizer


class Weight(Protocol):
    """Ŵ: a packed weight with its quantizer. A layer's parameter is one, and FrozenWeight."""

    quantizer: Quantizer
    number: int
    """Its key in :data:`WEIGHTS`, from :func:`new_number`."""

    @property
    def packed(self) -> PackedWeight: ...

    @property
    def layout(self) -> PackedLayout: ...


WEIGHTS: WeakValueDictionary[int, Weight] = WeakValueDictionary()
"""Each Ŵ that is alive. A torch operation takes tensors and numbers, so it gets Ŵ's number."""

_NUMBERS = count()


def new_number(weight: Weight) -> int:
    """Give Ŵ a number of its own."""
    number = next(_NUMBERS)
    WEIGHTS[number] = weight
    return number


class FrozenWeight:
    """Ŵ outside of a layer."""

    def __init__(self, quantizer: Quantizer, packed: PackedWeight) -> None:
        self.quantizer, self.packed, self.layout = quantizer, packed, packed.layout
        self.number = new_number(self)


def lora_linear(
    x: Tensor,
    weight: Weight,
    bias: Tensor | None = None,
    A: Tensor | None = None,
    B: Tensor | None = None,
    *,
    scale: float = 1.0,
    dropout: float = 0.0,
    input_scale: Tensor | None = None,
    output_scale: Tensor | None = None,
) -> Tensor:
    """A linear layer with a packed weight and, if given, a LoRA adapter and channel scales.

    Args:
        x: ``[..., in]``, any float dtype, any number of leading dimensions.
        weight: Ŵ, ``[out, in]``. It gets no gradient.
        bias: ``[out]``.
        A: ``[r, in]``; B: ``[out, r]``. They are cast to the dtype in which ``x`` is multiplied.
        scale: s, often α / r.
        dropout: the probability with which the adapter ignores an entry of ``x``.
        input_scale: u, ``[in]``; output_scale: v, ``[out]``.

    Returns:
        ``[..., out]`` in ``x``'s dtype.

    Raises ShapeError: ``x``, A, B, the scales and Ŵ do not fit together.
    """
    _check_operands(weight.layout.shape, x, A, B, input_scale, output_scale)
    delta = None if A is None or B is None else _lora(x, A, B, scale, dropout)
    scaled = x if input_scale is None else (x * input_scale).to(x.dtype)
    y = packed_product(scaled, weight)
    if output_scale is not None:
        y = y * output_scale
    for term in (bias, delta):
        y = y if term is None else y + term
    return y.to(x.dtype)


def packed_product(x: Tensor, weight: Weight, transpose: bool = False) -> Tensor:
    """``x Ŵᵀ``, or ``x Ŵ`` when ``transpose``; differentiable in ``x``, in its dtype."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return torch.ops.modulora.product(x, weight.number, transpose)  # type: ignore[no-any-return]
    return _multiply(x, weight, transpose)  # decoding: torch's dispatcher takes 15 µs


def packed_lookup(ids: Tensor, table: Weight, dtype: torch.dtype) -> Tensor:
    """``Ŵ[ids]``, ``[*ids.shape, in]`` in ``dtype``, without a gradient, as an embedding needs it.

    Raises IndexError for an id outside of the table."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return torch.ops.modulora.lookup(ids, table.number, dtype)  # type: ignore[no-any-return]
    return table.quantizer.lookup(ids, table.packed, dtype)


def _lora(x: Tensor, A: Tensor, B: Tensor, scale: float, dropout: float) -> Tensor:
    """``s · (x Aᵀ) Bᵀ``, ``[..., out]``."""
    x = x.to(compute_dtype(x.dtype, x.device))
    if dropout:  # F.dropout saves a mask in x's dtype on a CPU; this one's is bool
        x = torch.native_dropout(x, dropout, True)[0]
    xA, B = F.linear(x, A.to(x.dtype)), B.to(x.dtype)
    if not x.is_cuda:
        return F.linear(scale * xA, B)
    # a kernel fewer for each layer and token; on a CPU torch takes twice as long for this
    delta = torch.addmm(x.new_empty(()), xA.reshape(-1, len(A)), B.t(), beta=0, alpha=scale)
    return delta.view(*x.shape[:-1], len(B))


def _multiply(x: Tensor, weight: Weight, transpose: bool) -> Tensor:
    try:
        return weight.quantizer.matmul(x, weight.packed, transpose)
    except (Exception, SystemExit) as error:
        product, shape = "transposed product" if transpose else "product", weight.layout.shape
        note_plugin(error, weight.quantizer.spec.name, f"{product} of a layer of {list(shape)}")
        raise


def _check_operands(
    shape: tuple[int, int],
    x: Tensor,
    A: Tensor | None,
    B: Tensor | None,
    u: Tensor | None,
    v: Tensor | None,
) -> None:
    """Refuse an input, an adapter or channel scales whose shapes do not fit Ŵ's.

    Raises ShapeError: names the operand, its expected shape and its shape.
    """
    if (A is None) != (B is None):
        raise ShapeError("LoRA adapter: expected both A and B, got one of them")
    (out_features, in_features), rank = shape, () if A is None else A.shape[:1]
    for name, tensor, *expected in (
        ("input", x, *x.shape[:-1], in_features),
        ("A", A, *rank, in_features),
        ("B", B, out_features, *rank),
        ("input_scale", u, in_features),
        ("output_scale", v, out_features),
    ):
        if tensor is not None and list(tensor.shape) != expected:
            weight = f"a {list(shape)} weight"
            raise ShapeError(f"{name} of {weight}: expected {expected}, got {list(tensor.shape)}")


# --- torch's operations ----------------------------------------------------------------------


def compute_product(x: Tensor, number: int, transpose: bool) -> Any:
    """The product with the weight of this number, as torch's operation computes it."""
    y: Any = _multiply(x, WEIGHTS[number], transpose)
    # matmul may return a view, and autograd forbids `y += ...` on a view that an operation returned
    return y.new_empty(0).set_(y)


def _empty_product(x: Tensor, number: int, transpose: bool) -> Tensor:
    return x.new_empty(*x.shape[:-1], WEIGHTS[number].layout.shape[1 if transpose else 0])


def _setup_context(ctx: Any, inputs: tuple[Tensor, int, bool], **_: Tensor) -> None:
    ctx.number, ctx.transpose = inputs[1:]
    ctx.weight = WEIGHTS[ctx.number]  # the graph holds it until the backward


def _backward(ctx: Any, dY: Tensor) -> tuple[Tensor, None, None]:
    return torch.ops.modulora.product(dY, ctx.number, not ctx.transpose), None, None


def _compute_lookup(ids: Tensor, number: int, dtype: torch.dtype) -> Tensor:
    table = WEIGHTS[number]
    return table.quantizer.lookup(ids, table.packed, dtype)


def _empty_rows(ids: Tensor, number: int, dtype: torch.dtype) -> Tensor:
    return ids.new_empty(*ids.shape, WEIGHTS[number].layout.shape[1], dtype=dtype)


_OPS = torch.library.Library("modulora", "DEF")
_OPS.define("product(Tensor x, int weight, bool transpose) -> Tensor")
_OPS.impl("product", compute_product, "CompositeExplicitAutograd")
torch.library.register_fake("modulora::product", _empty_product, lib=_OPS)
torch.library.register_autograd(
    "modulora::product", _backward, setup_context=_setup_context, lib=_OPS
)
_OPS.define("lookup(Tensor ids, int weight, ScalarType dtype) -> Tensor")
_OPS.impl("lookup", _compute_lookup, "CompositeExplicitAutograd")
torch.library.register_fake("modulora::lookup", _empty_rows, lib=_OPS)
