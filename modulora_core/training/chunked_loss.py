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

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from transformers.loss.loss_utils import ForCausalLMLoss

from modulora_core.data.formats import IGNORED
from modulora_core.training.readout import WHOLE, Head, Readout, read_out

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

    It sets ``model.loss_function``, which transformers provides for this, and torch's hooks. The
    output then has the logits of the last position alone. The usual loss with whole logits remains
    in three cases. The head is no plain linear layer. The loss is not transformers' causal loss.
    The model does more with its logits than scale and cap them.

    Args:
        model: a transformers model, not wrapped.
        chunk_bytes: limit of a chunk's logits in fp32, at least one row. None: the default for the
            device, :data:`CHUNK_BYTES_CPU` or :data:`CHUNK_BYTES_GPU`.
        row_loss: the loss of a row, for a model with transformers' causal loss.
    """
    before = model.loss_function
    forward = inspect.unwrap(type(model).forward)
    if before is not ForCausalLMLoss or "loss_function" not in forward.__code__.co_names:
        assert row_loss is cross_entropy, "the model has a loss of its own"
        yield
        return
    with read_out(model) as readout:
        model.loss_function = partial(
            _causal_lm_loss, readout, chunk_bytes=chunk_bytes, row_loss=row_loss
        )
        try:
            yield
        finally:
            model.loss_function = before


def token_losses(
    readout: Readout | Tensor, labels: Tensor, chunk_bytes: int | None = None
) -> Tensor:
    """-log p of each label, in nats, and 0 for an ignored one; without a gradient.

    Args:
        readout: of a forward; or whole logits, ``[batch, length, vocabulary]``. Row t predicts
            label t + 1.
        labels: int64 ``[batch, length]``; :data:`IGNORED` is none.
        chunk_bytes: as for :func:`chunked_loss`.

    Returns:
        ``[batch, length - 1]``, in fp32 or wider.
    """
    readout = Readout(readout) if isinstance(readout, Tensor) else readout
    assert readout.hidden is not None
    goals = labels[:, 1:].to(readout.hidden.device)
    losses = torch.zeros(goals.shape, dtype=_wide(readout.hidden.dtype), device=goals.device)
    with torch.no_grad():
        for at, z in _chunks(readout, goals, chunk_bytes):
            losses[at] = _row_losses(z, goals[at], cross_entropy, gradient=False)
            del z  # before the next chunk is computed
    return losses


def label_logits(readout: Readout, labels: Tensor) -> Iterator[Tensor]:
    """The logits of each label that is not ignored, ``[n, vocabulary]`` of some rows at a time.

    The arguments are those of :func:`token_losses`.
    """
    assert readout.hidden is not None
    for _, z in _chunks(readout, labels[:, 1:].to(readout.hidden.device), None):
        yield z


def _chunks(
    readout: Readout, goals: Tensor, chunk_bytes: int | None
) -> Iterator[tuple[tuple[Tensor, ...], Tensor]]:
    """The places of goals that are not ignored, and their logits, of some rows at a time."""
    hidden, head = readout.hidden, readout.head
    assert hidden is not None
    for rows in (goals != IGNORED).nonzero().split(_chunk_rows(hidden, head, chunk_bytes)):
        at = rows.unbind(1)
        yield at, head(hidden[at])


def _causal_lm_loss(
    readout: Readout,
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
    """The loss, with the arguments of transformers' ``ForCausalLMLoss``, and a loss of a row.

    It takes the hidden states out of ``readout``, which would keep them until the backward.
    """
    goals = shift_labels
    if goals is None:  # tokens < t predict t
        goals = F.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    hidden, head = readout.hidden, readout.head
    readout.hidden = None
    if readout.is_alone and hidden is None:  # read_out will repeat the forward, for whole logits
        return logits.new_zeros(())
    if hidden is None and row_loss is not cross_entropy:
        hidden, head = logits, WHOLE
    if hidden is None:
        return ForCausalLMLoss(  # type: ignore[no-any-return]
            logits, labels, vocab_size, num_items_in_batch, ignore_index, shift_labels, **options
        )
    goals = goals.reshape(-1).to(hidden.device)
    rows = (goals != ignore_index).nonzero().squeeze(1)
    hidden = hidden.reshape(-1, hidden.shape[-1])
    size = _chunk_rows(hidden, head, chunk_bytes)
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
    dz = z.detach()  # no step of the head's backward needs z
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


def _chunk_rows(hidden: Tensor, head: Head, chunk_bytes: int | None) -> int:
    if chunk_bytes is None:
        chunk_bytes = CHUNK_BYTES_CPU if hidden.device.type == "cpu" else CHUNK_BYTES_GPU
    size = head.size or hidden.shape[-1]
    return max(1, chunk_bytes // (size * _wide(hidden.dtype).itemsize))


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
