"""The loss of a causal language model, a few rows of logits at a time.

    loss = 1/N Σ -log p(y)          p = softmax(z)   z : logits of a row, [vocabulary]   y : its label
    ∂(-log p(y)) / ∂z = p - e_y     e_y : one at y, zero elsewhere

Whole, the logits of 512 tokens over a vocabulary of 49,152 take 96 MiB in fp32, and the usual loss holds three or four tensors of
that size. Here one chunk of rows exists at a time, and p - e_y overwrites it. Because that gradient needs nothing that comes later but a
factor, the gradients to the hidden states and to the head's parameters are made in the forward, while the chunk is there: the head is
not multiplied by again. Rows whose label is ignored are left out from the beginning.

It is exact: no sampling, no approximation, summed in fp32 or wider.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any, TypeGuard

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from transformers.loss.loss_utils import ForCausalLMLoss

from modulora_core.training.deferred_logits import DeferredLogits, Head, deferred_head

CPU_LOGIT_BYTES = 32 * 2**20
"""170 rows of a vocabulary of 49,152 in fp32: enough for a matrix product to run at its full rate."""

ACCELERATOR_LOGIT_BYTES = 256 * 2**20
"""A GPU needs more rows at a time: 256 of a vocabulary of 262,144."""

_PIECES = 4
"""In how many pieces a chunk is exponentiated. Logits in 16 bits are widened for that, and only a piece of them at a time."""

_IGNORED = -100
_FACTOR = 2.0**10
"""p - e_y is multiplied by this on its way through the head, and divided by it afterwards: most of p is smaller than 6e-5, where float16's
normal numbers end. A power of two changes no bit in the other dtypes."""


@contextmanager
def chunked_loss(model: Any, logit_bytes: int | None = None) -> Iterator[None]:
    """In this block the loss that ``model`` computes from ``labels`` needs no whole logits.

    The model's forward runs as it is. A head that isn't a plain linear layer, a loss function that isn't transformers' usual one of
    causal language models, or a step between the two that isn't pointwise, gets the whole logits, and the result is that of before.

    Args:
        model: a transformers model, not wrapped.
        logit_bytes: how much a chunk of logits takes at most, in fp32; never less than one row. None is the default for the device.
    """
    if model.loss_function is not ForCausalLMLoss:
        yield
        return
    before = model.__dict__.get("_loss_function")
    with deferred_head(model.get_output_embeddings()):
        model.loss_function = partial(_causal_lm_loss, logit_bytes=logit_bytes)
        try:
            yield
        finally:
            del model._loss_function
            if before is not None:
                model.loss_function = before


def _causal_lm_loss(
    logits: Tensor,
    labels: Tensor,
    vocab_size: int,
    num_items_in_batch: Tensor | int | None = None,
    ignore_index: int = _IGNORED,
    shift_labels: Tensor | None = None,
    *,
    logit_bytes: int | None = None,
    **options: Any,
) -> Tensor:
    """The loss, in the place of transformers' ``ForCausalLMLoss`` and with its arguments."""
    goals = shift_labels
    if goals is None:  # tokens < t predict t
        goals = torch.nn.functional.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    if not _in_chunks(logits) or logits.shape != (*goals.shape, vocab_size):
        return ForCausalLMLoss(  # type: ignore[no-any-return]
            logits, labels, vocab_size, num_items_in_batch, ignore_index, shift_labels, **options
        )
    goals = goals.reshape(-1).to(logits.device)
    rows = (goals != ignore_index).nonzero().squeeze(1)
    hidden = logits.hidden.reshape(-1, logits.hidden.shape[-1])
    size = _chunk_rows(logits, logit_bytes)
    loss: Tensor = _SummedLoss.apply(
        hidden, goals, rows, size, logits.head, *logits.head.parameters
    )
    count = len(rows) if num_items_in_batch is None else num_items_in_batch
    return loss / (count.to(loss.device) if isinstance(count, Tensor) else count)


def token_losses(logits: Tensor, labels: Tensor, logit_bytes: int | None = None) -> Tensor:
    """-log p of each label, in nats, and 0 where it is ignored; without a gradient.

    Args:
        logits: ``[batch, length, vocabulary]``, of a model called in :func:`deferred_logits` or whole; those at t are for the label
            at t + 1.
        labels: int64 ``[batch, length]``, -100 for what is ignored.
        logit_bytes: as for :func:`chunked_loss`.

    Returns:
        ``[batch, length - 1]``, in fp32 or wider.
    """
    goals = labels[:, 1:].to(logits.device)
    losses = torch.zeros(goals.shape, dtype=_wide(logits.dtype), device=logits.device)
    with torch.no_grad():
        for rows in (goals != _IGNORED).nonzero().split(_chunk_rows(logits, logit_bytes)):
            at = rows.unbind(1)
            z = logits.head(logits.hidden[at]) if _in_chunks(logits) else logits[at]
            losses[at] = _losses(z, goals[at])
    return losses


def deferred_logits(model: Any) -> AbstractContextManager[None]:
    """In this block the logits that ``model`` gives are multiplied when they are read: whole, or by :func:`token_losses` in chunks."""
    return deferred_head(model.get_output_embeddings())


class _SummedLoss(torch.autograd.Function):
    """Σ -log p(y) over ``rows``. Its gradient is there when the forward is over."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        goals: Tensor,
        rows: Tensor,
        size: int,
        head: Head,
        *parameters: Tensor,
    ) -> Tensor:
        sources = [hidden, *parameters]
        trains = [ctx.needs_input_grad[0], *ctx.needs_input_grad[5:]]
        gradients = [
            _zeros(x, x.dtype) if needed else None
            for x, needed in zip(sources, trains, strict=True)
        ]
        total = _zeros(hidden.new_empty(()), hidden.dtype)
        for chunk in rows.split(size):
            total += _chunk_loss(hidden, goals, chunk, head, gradients)
        ctx.dtypes = [source.dtype for source in sources]
        ctx.save_for_backward(*gradients)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        factor = upstream / _FACTOR
        made = [
            None if gradient is None else (gradient * factor).to(dtype)
            for gradient, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        ]
        return made[0], None, None, None, None, *made[1:]


def _chunk_loss(
    hidden: Tensor, goals: Tensor, rows: Tensor, head: Head, gradients: list[Tensor | None]
) -> Tensor:
    """Σ -log p(y) over one chunk, whose gradients, to the hidden states and the head's parameters, are added to ``gradients``.

    A function of its own, so that a chunk's logits are gone before the next one's are made.
    """
    needed = [i for i, gradient in enumerate(gradients) if gradient is not None]
    x = hidden[rows].requires_grad_(0 in needed)  # [size, hidden], a copy
    with torch.set_grad_enabled(bool(needed)):
        z = head(x)
    scores = z.detach()
    dz = torch.empty_like(scores) if head.steps else scores  # a step may need what it made
    losses = _losses(scores, goals[rows], dz if needed else None)
    if needed:
        sources = [x, *head.parameters]
        made = torch.autograd.grad(z, [sources[i] for i in needed], dz, materialize_grads=True)
        for i, gradient in zip(needed, made, strict=True):
            total = gradients[i]
            assert total is not None
            if i == 0:
                total[rows] = gradient.to(total.dtype)
            else:
                total += gradient
    return losses.sum()


def _losses(z: Tensor, goals: Tensor, dz: Tensor | None = None) -> Tensor:
    """-log p(y), ``[n]`` in fp32 or wider, and, in ``dz``, p - e_y times :data:`_FACTOR`.

    Args:
        z: ``[n, vocabulary]``. It is overwritten, if ``dz`` isn't other memory.
        goals: y, ``[n]``.
        dz: like ``z``, or ``z`` itself.
    """
    rows = max(1, -(-len(z) // _PIECES))
    parts, labels = z.split(rows), goals.split(rows)
    places: Sequence[Tensor | None] = [None] * len(parts) if dz is None else dz.split(rows)
    overwrite = dz is None or dz is z
    return torch.cat(
        [_softmax(*each, overwrite) for each in zip(parts, labels, places, strict=True)]
    )


def _softmax(z: Tensor, goals: Tensor, dz: Tensor | None, overwrite: bool) -> Tensor:
    """As :func:`_losses`, of all rows at once."""
    p = z
    if z.dtype != _wide(z.dtype):
        p = z.to(_wide(z.dtype))
    elif dz is not None and not overwrite:
        p = dz.copy_(z)
    at_goal = p.gather(1, goals[:, None])
    largest = p.amax(1, keepdim=True)
    total = p.sub_(largest).exp_().sum(1, keepdim=True)
    if dz is not None:
        p.div_(total)
        p[torch.arange(len(p), device=p.device), goals] -= 1
        p.mul_(_FACTOR)
        if p.dtype != dz.dtype:
            dz.copy_(p)
    return (total.log() + largest - at_goal).squeeze(1)


def _in_chunks(logits: Tensor) -> TypeGuard[DeferredLogits]:
    return (
        isinstance(logits, DeferredLogits)
        and not logits.is_whole
        and logits.device == logits.hidden.device
    )


def _chunk_rows(logits: Tensor, logit_bytes: int | None) -> int:
    if logit_bytes is None:
        logit_bytes = CPU_LOGIT_BYTES if logits.device.type == "cpu" else ACCELERATOR_LOGIT_BYTES
    return max(1, logit_bytes // (logits.shape[-1] * _wide(logits.dtype).itemsize))


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _zeros(like: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros(like.shape, dtype=_wide(dtype), device=like.device)
