"""The loss of a causal language model, one chunk of rows of logits at a time.

    loss = 1/N Σ -log p(y)          p = softmax(z)    z : logits of a row, [vocabulary]
    ∂(-log p(y)) / ∂z = p - e_y     y : its label     e_y : one at y, zero elsewhere

A :data:`RowLoss` may take the place of -log p(y).

512 tokens × 49,152 entries of a vocabulary take 96 MiB in fp32, and the usual loss has three or
four such tensors. Here the logits of one chunk exist at a time, and p - e_y overwrites them. The
forward also computes the gradients of hidden states and head, since p - e_y needs nothing else. So
the backward does not multiply by the head again. Rows with an ignored label are left out.

The loss is exact: no approximation, and sums in fp32 or wider.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any, TypeGuard

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from transformers.loss.loss_utils import ForCausalLMLoss

from modulora_core.data.rendering import IGNORED
from modulora_core.training.deferred_logits import DeferredLogits, Head, deferred_head

CHUNK_BYTES_CPU = 32 * 2**20
"""Size of a chunk's logits in fp32: 170 rows of a vocabulary of 49,152. Matrix products are at full
rate with that many rows."""

CHUNK_BYTES_GPU = 256 * 2**20
"""A GPU needs more rows at a time: 256 of a vocabulary of 262,144."""

_PIECES = 4
"""The softmax widens 16-bit logits in this many pieces, to need less memory for the wide copy."""

_FACTOR = 2.0**10
"""Scales p - e_y on its way through the head, since most of p is below float16's normal numbers
(6e-5). A power of two changes no bit in the other dtypes."""


RowLoss = Callable[[Tensor, Tensor, slice, bool], Tensor]
"""``row_loss(z, goals, rows, gradient)`` of some rows gives their losses, ``[n, 1]``.

z is ``[n, vocabulary]``, in fp32 or wider. With ``gradient``, ∂loss / ∂z overwrites it. goals has
the labels y, ``[n, 1]``. ``rows`` are their places among the batch's labels that are not ignored.
"""


def cross_entropy(z: Tensor, goals: Tensor, rows: slice, gradient: bool) -> Tensor:  # noqa: ARG001
    """-log p(y), a :data:`RowLoss`."""
    at_goal = z.gather(1, goals)
    largest = z.amax(1, keepdim=True)
    total = z.sub_(largest).exp_().sum(1, keepdim=True)
    if gradient:
        z.div_(total).scatter_add_(1, goals, torch.full_like(total, -1.0))
    return total.log() + largest - at_goal


@contextmanager
def chunked_loss(
    model: Any, chunk_bytes: int | None = None, row_loss: RowLoss = cross_entropy
) -> Iterator[None]:
    """Let ``model`` compute its loss from ``labels`` without whole logits, in this block.

    It sets ``model.loss_function``, which transformers provides for this, and hooks on the head.
    The usual loss with whole logits remains in three cases. The head is no plain linear layer; the
    loss is not transformers' causal loss; or a step between them is not pointwise.

    Args:
        model: a transformers model, not wrapped.
        chunk_bytes: limit of a chunk's logits in fp32, at least one row. None: the default for the
            device, :data:`CHUNK_BYTES_CPU` or :data:`CHUNK_BYTES_GPU`.
        row_loss: the loss of a row, for a model with transformers' causal loss.
    """
    before = model.loss_function
    if before is not ForCausalLMLoss:
        assert row_loss is cross_entropy, "the model has a loss of its own"
        yield
        return
    with deferred_logits(model):
        model.loss_function = partial(_causal_lm_loss, chunk_bytes=chunk_bytes, row_loss=row_loss)
        try:
            yield
        finally:
            model.loss_function = before


def deferred_logits(model: Any) -> AbstractContextManager[None]:
    """Let ``model`` return logits that are computed when they are read, in this block."""
    return deferred_head(model.get_output_embeddings())


def token_losses(logits: Tensor, labels: Tensor, chunk_bytes: int | None = None) -> Tensor:
    """-log p of each label, in nats, and 0 for an ignored one; without a gradient.

    Args:
        logits: ``[batch, length, vocabulary]``, deferred or whole. Row t predicts label t + 1.
        labels: int64 ``[batch, length]``; -100 is ignored.
        chunk_bytes: as for :func:`chunked_loss`.

    Returns:
        ``[batch, length - 1]``, in fp32 or wider.
    """
    goals = labels[:, 1:].to(logits.device)
    losses = torch.zeros(goals.shape, dtype=_wide(logits.dtype), device=logits.device)
    with torch.no_grad():
        for at, z in _chunks(logits, goals, chunk_bytes):
            losses[at] = _row_losses(z, goals[at], cross_entropy, gradient=False)
            del z  # before the next chunk is computed
    return losses


def label_logits(logits: Tensor, labels: Tensor) -> Iterator[Tensor]:
    """The logits of each label that is not ignored, ``[n, vocabulary]`` of some rows at a time.

    The arguments are those of :func:`token_losses`.
    """
    for _, z in _chunks(logits, labels[:, 1:].to(logits.device), None):
        yield z


def _chunks(
    logits: Tensor, goals: Tensor, chunk_bytes: int | None
) -> Iterator[tuple[tuple[Tensor, ...], Tensor]]:
    """The places of goals that are not ignored, and their logits, of some rows at a time."""
    for rows in (goals != IGNORED).nonzero().split(_chunk_rows(logits, chunk_bytes)):
        at = rows.unbind(1)
        yield at, logits.head(logits.hidden[at]) if _is_deferred(logits) else logits[at]


def _causal_lm_loss(
    logits: Tensor,
    labels: Tensor,
    vocab_size: int,
    num_items_in_batch: Tensor | int | None = None,
    ignore_index: int = IGNORED,
    shift_labels: Tensor | None = None,
    *,
    chunk_bytes: int | None = None,
    row_loss: RowLoss = cross_entropy,
    **options: Any,
) -> Tensor:
    """The loss, with the arguments of transformers' ``ForCausalLMLoss``, and a loss of a row."""
    goals = shift_labels
    if goals is None:  # tokens < t predict t
        goals = F.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    hidden, head = logits, Head(lambda z: z, ())  # whole logits
    if _is_deferred(logits) and logits.shape == (*goals.shape, vocab_size):
        hidden, head = logits.hidden, logits.head
    elif row_loss is cross_entropy:
        return ForCausalLMLoss(  # type: ignore[no-any-return]
            logits, labels, vocab_size, num_items_in_batch, ignore_index, shift_labels, **options
        )
    goals = goals.reshape(-1).to(logits.device)
    rows = (goals != ignore_index).nonzero().squeeze(1)
    hidden = hidden.reshape(-1, hidden.shape[-1])
    size = _chunk_rows(logits, chunk_bytes)
    loss: Tensor = _SummedLoss.apply(hidden, goals, rows, size, head, row_loss, *head.parameters)
    count = len(rows) if num_items_in_batch is None else num_items_in_batch
    return loss / (count.to(loss.device) if isinstance(count, Tensor) else count)


class _SummedLoss(torch.autograd.Function):
    """The sum over ``rows``, in chunks of ``size``. The forward computes the gradients too."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        goals: Tensor,
        rows: Tensor,
        size: int,
        head: Head,
        row_loss: RowLoss,
        *parameters: Tensor,
    ) -> Tensor:
        sources = [hidden, *parameters]
        needed = [ctx.needs_input_grad[0], *ctx.needs_input_grad[6:]]
        gradients = [
            torch.zeros_like(source, dtype=_wide(source.dtype)) if is_needed else None
            for source, is_needed in zip(sources, needed, strict=True)
        ]
        total = hidden.new_zeros((), dtype=_wide(hidden.dtype))
        for i, chunk in enumerate(rows.split(size)):
            total += _chunk_loss(hidden, goals, chunk, head, row_loss, i * size, gradients)
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
        return made[0], None, None, None, None, None, *made[1:]


def _chunk_loss(
    hidden: Tensor,
    goals: Tensor,
    rows: Tensor,
    head: Head,
    row_loss: RowLoss,
    start: int,
    gradients: list[Tensor | None],
) -> Tensor:
    """The sum over one chunk. Adds its gradients, times :data:`_FACTOR`, to ``gradients``.

    It is a function so that the logits of one chunk are freed before the next.
    """
    needed = [i for i, gradient in enumerate(gradients) if gradient is not None]
    x = hidden[rows].requires_grad_(0 in needed)  # [size, hidden], a copy
    with torch.set_grad_enabled(bool(needed)):
        z = head(x)
    dz = z.detach()
    if needed and head.steps:  # the backward of a step may need z
        dz = dz.clone()
    loss = _row_losses(dz, goals[rows], row_loss, start, gradient=bool(needed)).sum()
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
    return loss


def _row_losses(
    z: Tensor, goals: Tensor, row_loss: RowLoss, start: int = 0, *, gradient: bool
) -> Tensor:
    """The loss of each row, ``[n]``, in fp32 or wider. It overwrites z.

    Args:
        z: ``[n, vocabulary]``.
        goals: y, ``[n]``.
        start: the number of the first row, for ``row_loss``.
        gradient: leave the gradient, times :data:`_FACTOR`, in z.
    """
    losses = []
    size = max(1, -(-len(z) // _PIECES))
    for piece, y in zip(z.split(size), goals[:, None].split(size), strict=True):
        p = piece.to(_wide(z.dtype))  # the piece itself if it is wide
        losses.append(row_loss(p, y, slice(start, start + len(p)), gradient).squeeze(1))
        start += len(p)
        if gradient:
            piece.copy_(p.mul_(_FACTOR))
        del p  # before the next piece is widened
    return torch.cat(losses)


def _is_deferred(logits: Tensor) -> TypeGuard[DeferredLogits]:
    return (
        isinstance(logits, DeferredLogits)
        and not logits.is_whole
        and logits.device == logits.hidden.device
    )


def _chunk_rows(logits: Tensor, chunk_bytes: int | None) -> int:
    if chunk_bytes is None:
        chunk_bytes = CHUNK_BYTES_CPU if logits.device.type == "cpu" else CHUNK_BYTES_GPU
    return max(1, chunk_bytes // (logits.shape[-1] * _wide(logits.dtype).itemsize))


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
