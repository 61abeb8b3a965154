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
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor
from torch.nn import functional as F

from modulora_core.dense_products import compute_dtype
from modulora_core.errors import note_plugin
from modulora_core.packed import PackedWeight, check_operands
from modulora_core.spec import Quantizer


def lora_linear(
    x: Tensor,
    quantizer: Quantizer,
    packed: PackedWeight,
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
        quantizer: the quantizer that packed ``packed``.
        packed: Ŵ, ``[out, in]``. It gets no gradient.
        bias: ``[out]``.
        A: ``[r, in]``; B: ``[out, r]``. They are cast to the dtype in which ``x`` is multiplied.
        scale: s, often α / r.
        dropout: the probability with which the adapter ignores an entry of ``x``.
        input_scale: u, ``[in]``; output_scale: v, ``[out]``.

    Returns:
        ``[..., out]`` in ``x``'s dtype.

    Raises:
        ShapeError: ``x``, A, B, the scales and Ŵ do not fit together.
    """
    check_operands(packed, x, A, B, input_scale, output_scale)
    delta = None if A is None or B is None else _lora(x, A, B, scale, dropout)
    scaled = x if input_scale is None else (x * input_scale).to(x.dtype)
    y = packed_product(scaled, quantizer, packed)
    if output_scale is not None:
        y = y * output_scale
    for term in (bias, delta):
        y = y if term is None else y + term
    return y.to(x.dtype)


def packed_product(
    x: Tensor, quantizer: Quantizer, packed: PackedWeight, transpose: bool = False
) -> Tensor:
    """``x Ŵᵀ``, or ``x Ŵ`` when ``transpose``; differentiable in ``x``, in its dtype."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        number = number_of(quantizer, packed)
        return torch.ops.modulora.product(x, number, transpose)  # type: ignore[no-any-return]
    return _multiply(x, quantizer, packed, transpose)  # decoding: torch's dispatcher takes 15 µs


def _lora(x: Tensor, A: Tensor, B: Tensor, scale: float, dropout: float) -> Tensor:
    """``s · (x Aᵀ) Bᵀ``, ``[..., out]``."""
    x = x.to(compute_dtype(x.dtype, x.device))
    if dropout:  # F.dropout saves a mask in x's dtype on a CPU; this one's is bool
        x = torch.native_dropout(x, dropout, True)[0]
    return F.linear(scale * F.linear(x, A.to(x.dtype)), B.to(x.dtype))


def _multiply(x: Tensor, quantizer: Quantizer, packed: PackedWeight, transpose: bool) -> Tensor:
    try:
        return quantizer.matmul(x, packed, transpose)
    except (Exception, SystemExit) as error:
        product = "transposed product" if transpose else "product"
        note_plugin(error, quantizer.spec.name, f"{product} of a layer of {list(packed.shape)}")
        raise


WEIGHTS: WeakValueDictionary[int, PackedWeight] = WeakValueDictionary()
QUANTIZERS: WeakValueDictionary[int, Quantizer] = WeakValueDictionary()
"""Packed weights and their quantizers by number: torch's operations take tensors and numbers."""

_NUMBERS = count()


def number_of(quantizer: Quantizer, packed: PackedWeight) -> int:
    """The key of a weight in :data:`WEIGHTS` and of its quantizer in :data:`QUANTIZERS`."""
    if quantizer not in packed.kept:
        number = packed.kept[quantizer] = next(_NUMBERS)
        WEIGHTS[number], QUANTIZERS[number] = packed, quantizer
    return packed.kept[quantizer]  # type: ignore[no-any-return]  # it holds anything


def compute_product(x: Tensor, number: int, transpose: bool) -> Any:
    """The product with the weight of this number, as torch's operation computes it."""
    y: Any = _multiply(x, QUANTIZERS[number], WEIGHTS[number], transpose)
    # matmul may return a view, and autograd forbids `y += ...` on a view that an operation returned
    return y.new_empty(0).set_(y)


def _empty_product(x: Tensor, number: int, transpose: bool) -> Tensor:
    return x.new_empty(*x.shape[:-1], WEIGHTS[number].shape[1 if transpose else 0])


def _setup_context(ctx: Any, inputs: tuple[Tensor, int, bool], **_: Tensor) -> None:
    ctx.number, ctx.transpose = inputs[1:]
    ctx.packed = WEIGHTS[ctx.number]  # the graph holds it until the backward


def _backward(ctx: Any, dY: Tensor) -> tuple[Tensor, None, None]:
    return torch.ops.modulora.product(dY, ctx.number, not ctx.transpose), None, None


_OPS = torch.library.Library("modulora", "DEF")
_OPS.define("product(Tensor x, int weight, bool transpose) -> Tensor")
_OPS.impl("product", compute_product, "CompositeExplicitAutograd")
torch.library.register_fake("modulora::product", _empty_product, lib=_OPS)
torch.library.register_autograd(
    "modulora::product", _backward, setup_context=_setup_context, lib=_OPS
)
