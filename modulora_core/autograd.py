"""The quantization-agnostic LoRA backward (ModuLoRA, arXiv 2309.16119, section 3).

    forward    Y  = X Ŵᵀ + s · (X Aᵀ) Bᵀ        X : [n, in]   Ŵ : [out, in], frozen, packed   A : [r, in]   B : [out, r]
    backward   dX = dY Ŵ + s · (dY B) A         dY : [n, out]
               dA = s · (dY B)ᵀ X
               dB = s · dYᵀ (X Aᵀ)

The quantizer is asked for Ŵ in the forward and again in the backward, through its ``matmul`` alone. Saved between
the two are X (only if A trains), U = X Aᵀ (only if B trains), A, B, one byte an input for a dropout mask, and
references to the packed tensors; never Ŵ.

The adapter is computed in the dtype of A and B, and no copy of X, Y or dY is made for it (:mod:`modulora_core.low_rank`), so nothing of
the size of Y exists besides Y.

Channel scales u [in] and v [out] put diag(v) Ŵ diag(u) in the place of Ŵ; bias and adapter aren't scaled:

    forward    Z  = (X ⊙ u) Ŵᵀ                  Y = v ⊙ Z + …
    backward   dX = u ⊙ dXᵤ + …                 dXᵤ = (v ⊙ dY) Ŵ
               du = Σ X ⊙ dXᵤ over the rows     dv = Σ dY ⊙ Z over the rows

X is saved if u trains, and Z, ``[n, out]``, only if v trains: to multiply again would cost another decoding of Ŵ.
X ⊙ u and v ⊙ dY are made where they are multiplied, and dropped.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from modulora_core import kept_products, low_rank
from modulora_core.errors import ShapeError, note_plugin
from modulora_core.low_rank import copy_bytes, row_chunks
from modulora_core.spec import PackedWeight, Quantizer
from modulora_core.tiles import tile_bytes, tile_ranges


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
    transpose: bool = False,
) -> Tensor:
    """A linear layer with a packed weight and, if they are given, a LoRA adapter and channel scales.

    Args:
        x: ``[..., in]``, any float dtype, any number of leading dimensions, also zero rows.
        quantizer: what packed ``packed``.
        packed: Ŵ, ``[out, in]``. It gets no gradient.
        bias: ``[out]``, cast to ``x``'s dtype.
        A: ``[r, in]``; B: ``[out, r]``. Each trains if it requires a gradient.
        scale: s, often α / r.
        dropout: probability with which an entry of ``x`` is left out *of the adapter's input*; the rest is
            scaled up. 0 outside of training: the caller decides.
        input_scale: u, ``[in]``; output_scale: v, ``[out]``; any float dtype. They scale the packed weight's
            product alone, and each trains if it requires a gradient (summed in float32 or wider).
        transpose: multiply by Ŵ instead of Ŵᵀ (``x: [..., out]``, result ``[..., in]``); without an adapter and
            without scales.

    Returns:
        ``[..., out]`` in ``x``'s dtype, differentiable once in ``x``, ``bias``, ``A``, ``B`` and the scales.

    Raises:
        ShapeError: A, B, the scales and Ŵ don't fit together.
    """
    if A is not None or B is not None:
        _check_adapter(packed.shape, A, B, transpose)
    if input_scale is not None or output_scale is not None:
        _check_scales(x, packed.shape, input_scale, output_scale, transpose)
    frozen = (quantizer, packed, scale, transpose)
    if torch.compiler.is_compiling():  # it can't know what a quantizer's compiled kernels do
        from modulora_core.uncompiled import uncompiled

        return uncompiled(  # type: ignore[no-any-return]  # the decorator has no types
            _recorded, x, bias, A, B, input_scale, output_scale, dropout, *frozen
        )
    if torch.is_grad_enabled() or kept_products.is_inside():
        return _recorded(x, bias, A, B, input_scale, output_scale, dropout, *frozen)
    # decoding: a Function takes as long as a small layer, and other calls that do nothing a tenth of that
    Z = _multiplied(x, input_scale, quantizer, packed, transpose)
    if A is None and bias is None and output_scale is None:
        return Z
    _, U = _projected(x, A, dropout)
    return _finished(Z, bias, B, output_scale, U, scale)


def _recorded(
    x: Tensor,
    bias: Tensor | None,
    A: Tensor | None,
    B: Tensor | None,
    u: Tensor | None,
    v: Tensor | None,
    dropout: float,
    quantizer: Quantizer,
    packed: PackedWeight,
    scale: float,
    transpose: bool,
) -> Tensor:
    """The result, with what its backward needs saved *before* the packed weight is multiplied by.

    Gradient checkpointing runs a block again for what it saves, so its last product, in a Llama a quarter of its multiplications, needn't
    be made again if nothing is saved behind it: torch's stops there, and :mod:`modulora_core.kept_products` has zeros for it. So autograd
    records a result without memory, which gets that of the product afterwards.
    """
    multiply = partial(_multiplied, x, u, quantizer, packed, transpose)
    finish = partial(_finished, bias=bias, B=B, v=v, scale=scale)
    Z = None
    with torch.no_grad():
        keep, U = _projected(x, A, dropout)
        if v is not None and v.requires_grad:  # Z is one of the saved
            Z = kept_products.product_or(multiply)
            kept_products.keep(Z, is_needed=True)
    result: Tensor = _LoRALinear.apply(
        x, bias, A, B, u, v, U, keep, Z, dropout, quantizer, packed, scale, transpose
    )
    with torch.no_grad():
        if Z is not None:
            result.data = finish(Z, U=U, keep_Z=True)
            return result
        result.data = kept_products.product_or(lambda: finish(multiply(), U=U))
    kept_products.keep(result)
    return result


def _check_adapter(shape: tuple[int, int], A: Tensor | None, B: Tensor | None, transpose: bool) -> None:
    out_features, in_features = shape
    if A is None or B is None:
        raise ShapeError("LoRA adapter: expected both A and B, got one of them")
    if transpose:
        raise ShapeError("LoRA adapter: a transposed product takes none")
    if A.dim() != 2 or B.dim() != 2 or A.shape[1] != in_features or B.shape != (out_features, A.shape[0]):
        raise ShapeError(f"LoRA adapter of a [{out_features}, {in_features}] weight: expected A [r, {in_features}] and "
                         f"B [{out_features}, r], got A {list(A.shape)} and B {list(B.shape)}")  # fmt: skip
    if A.dtype != B.dtype:
        raise ShapeError(f"LoRA adapter: expected A and B of one dtype, got {A.dtype} and {B.dtype}")


def _check_scales(
    x: Tensor, shape: tuple[int, int], u: Tensor | None, v: Tensor | None, transpose: bool
) -> None:
    if transpose and (u is not None or v is not None):
        raise ShapeError("channel scales: a transposed product takes none")
    out_features, in_features = shape
    for name, vector, length in (("input_scale", u, in_features), ("output_scale", v, out_features)):
        if vector is not None and vector.shape != (length,):
            raise ShapeError(f"{name} of a [{out_features}, {in_features}] weight: expected [{length}], "
                             f"got {list(vector.shape)}")  # fmt: skip
    if u is not None and x.shape[-1:] != u.shape:  # without u, the product says so
        raise ShapeError(f"input of a [{out_features}, {in_features}] weight: expected [..., {in_features}], "
                         f"got {list(x.shape)}")  # fmt: skip


class _LoRALinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        bias: Tensor | None,
        A: Tensor | None,
        B: Tensor | None,
        u: Tensor | None,
        v: Tensor | None,
        U: Tensor | None,
        keep: Tensor | None,
        Z: Tensor | None,
        dropout: float,
        quantizer: Quantizer,
        packed: PackedWeight,
        scale: float,
        transpose: bool,
    ) -> Tensor:
        """The result's shape and dtype alone, in the memory of one number."""
        x_trains, bias_trains, A_trains, B_trains, u_trains, _ = ctx.needs_input_grad[:6]
        ctx.quantizer, ctx.packed = quantizer, packed
        ctx.scale, ctx.dropout, ctx.transpose = scale, dropout, transpose
        ctx.bias_dtype = bias.dtype if bias is not None and bias_trains else None
        ctx.save_for_backward(
            x if A_trains or u_trains else None,
            U if B_trains else None,
            Z,
            keep if A_trains or x_trains else None,
            A,
            B,
            u,
            v,
        )
        shape = (*x.shape[:-1], packed.shape[1 if transpose else 0])
        return x.new_empty_strided(shape, [0] * len(shape))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dY: Tensor) -> tuple[Tensor | None, ...]:
        x, U, Z, keep, A, B, u, v = ctx.saved_tensors
        x_trains, bias_trains, A_trains, B_trains, u_trains, v_trains = ctx.needs_input_grad[:6]
        dX = dbias = dA = dB = du = None
        dv = _column_dots(dY, Z, v) if v_trains else None
        if x_trains or u_trains:
            dX, du = _through_weight(ctx, dY, x, u, v)
        with _without_autocast(dY.device.type):
            dY2 = dY.reshape(-1, dY.shape[-1])  # [n, out]
            if bias_trains:
                dbias = dY2.sum(0, dtype=torch.promote_types(dY.dtype, torch.float32)).to(ctx.bias_dtype)
            if A is not None and (x_trains or A_trains or B_trains):
                V = low_rank.project(dY2, B.t())  # dY B : [n, r]
                if B_trains:
                    dB = low_rank.gather(U * ctx.scale, dY2).t().contiguous()
                V = _made_up(V.mul_(ctx.scale), ctx.dropout)
                if dX is not None:
                    low_rank.add_expanded(dX.view(-1, dX.shape[-1]), V, A, keep)
                if A_trains:
                    dA = low_rank.gather(V, x.reshape(-1, x.shape[-1]), keep)
        return dX, dbias, dA, dB, du, dv, *[None] * 8


def _projected(x: Tensor, A: Tensor | None, dropout: float) -> tuple[Tensor | None, Tensor | None]:
    """The dropout mask and U; None without an adapter."""
    if A is None:
        return None, None
    with _without_autocast(x.device.type):
        x2 = x.reshape(-1, x.shape[-1])
        keep = _dropout_mask(x2, dropout)
        return keep, _made_up(low_rank.project(x2, A, keep), dropout)  # dropout(X) Aᵀ : [n, r]


def _multiplied(
    x: Tensor, u: Tensor | None, quantizer: Quantizer, packed: PackedWeight, transpose: bool
) -> Tensor:
    """Z, ``[..., out]``."""
    try:
        return quantizer.matmul(x if u is None else _scaled(x, u), packed, transpose)
    except Exception as error:  # whatever a plugin raises
        _note(error, quantizer, packed, transpose)
        raise


def _finished(
    Z: Tensor,
    bias: Tensor | None,
    B: Tensor | None,
    v: Tensor | None,
    U: Tensor | None,
    scale: float,
    *,
    keep_Z: bool = False,
) -> Tensor:
    """Y, in Z's memory unless Z is to be kept beside it."""
    y = Z if v is None else _scaled(Z, v, in_place=not keep_Z)
    if bias is None and U is None:
        return y
    y2 = y.view(-1, y.shape[-1])
    with _without_autocast(y.device.type):
        if bias is not None:
            y2 += bias.to(y.dtype)
        if B is not None and U is not None:
            low_rank.add_expanded(y2, U, B.t(), scale=scale)
    return y


def _note(error: Exception, quantizer: Quantizer, packed: PackedWeight, transpose: bool) -> None:
    what = "transposed product" if transpose else "product"
    note_plugin(error, quantizer.spec.name, f"{what} of a layer of {list(packed.shape)}")


def _without_autocast(device: str) -> AbstractContextManager[object]:
    """Autocast off; nothing at all where it is off, which a layer asks for each token."""
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()


def _through_weight(
    ctx: Any, dY: Tensor, x: Tensor | None, u: Tensor | None, v: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """The packed weight's share of dX, if x trains, and du, if u trains."""
    x_trains, u_trains = ctx.needs_input_grad[0], ctx.needs_input_grad[4]
    try:
        dX: Tensor = ctx.quantizer.matmul(dY if v is None else _scaled(dY, v), ctx.packed, not ctx.transpose)
    except Exception as error:  # whatever a plugin raises
        _note(error, ctx.quantizer, ctx.packed, not ctx.transpose)
        raise
    if u is None:
        return dX, None
    du = _column_dots(x, dX, u) if x is not None and u_trains else None
    return (_scaled(dX, u, in_place=True) if x_trains else None), du


def _scaled(x: Tensor, by: Tensor, *, in_place: bool = False) -> Tensor:
    """``x ⊙ by`` for ``x: [..., d]`` and ``by: [d]``, in ``x``'s dtype, rounded once; ``x`` itself if in place."""
    y = x if in_place else torch.empty(x.shape, dtype=x.dtype, device=x.device)
    x2, y2 = x.reshape(-1, x.shape[-1]), y.view(-1, y.shape[-1])
    for rows in row_chunks(x2, torch.promote_types(x.dtype, by.dtype)):
        torch.mul(x2[rows], by, out=y2[rows])
    return y


def _column_dots(x: Tensor, y: Tensor, like: Tensor) -> Tensor:
    """Σ x ⊙ y over the rows, ``[d]`` in the dtype of ``like``, summed in float32 or wider, a chunk of rows at a time."""
    dtype = torch.promote_types(torch.promote_types(x.dtype, torch.float32), like.dtype)
    x2, y2 = x.reshape(-1, x.shape[-1]), y.reshape(-1, y.shape[-1])
    total = torch.zeros(like.shape, dtype=dtype, device=x.device)
    for start, stop in tile_ranges(x2.shape[0], x2.shape[1] * dtype.itemsize, tile_bytes(x.device)):
        total += (x2[start:stop].to(dtype) * y2[start:stop]).sum(0)
    return total.to(like.dtype)


def _dropout_mask(x: Tensor, dropout: float) -> Tensor | None:
    """``[n, in]`` bool, True where an input is kept; None without dropout.

    Drawn 16 bits an input, four inputs at a time: on a CPU ``bernoulli_`` takes three times as long
    (docs/performance-findings.md). The probability is thus rounded to a multiple of 2^-16.
    """
    if dropout == 0.0:
        return None
    keep = torch.empty(x.shape, dtype=torch.bool, device=x.device)
    flat, below = keep.view(-1), round(dropout * 2**16) - 2**15
    step = max(4, copy_bytes(x.device) // 2 // 4 * 4)  # whole words
    for start in range(0, len(flat), step):
        part = flat[start : start + step]
        words = torch.empty(-(-len(part) // 4), dtype=torch.int64, device=x.device).random_(-(2**63), None)
        torch.ge(words.view(torch.int16)[: len(part)], below, out=part)
    return keep


def _made_up(U: Tensor, dropout: float) -> Tensor:
    """U, in place, scaled up for the inputs that were dropped."""
    return U if dropout == 0.0 else U.mul_(1.0 / (1.0 - dropout))
