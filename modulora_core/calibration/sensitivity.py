"""Measures how much the loss depends on errors in each layer's outputs, by one backward pass.

Quantizing changes a layer's output at token t by ΔW xₜ. To second order the model's distribution
moves by the Kullback-Leibler divergence, in nats per token,

    KL ≈ ½ E[(gₜᵀ ΔW xₜ)²] ≈ ½ E[Σᵢ gₜᵢ² (ΔW xₜ)ᵢ²] ≈ ½ Σᵢ sᵢ (ΔW H ΔWᵀ)ᵢᵢ

    sᵢ = E[gₜᵢ²]      H = E[wₜ xₜ xₜᵀ]      wₜ = ‖gₜ‖² / E‖g‖²

Here g is the gradient of -log p(token) in the layer's output, with each token drawn from the
model's own distribution. E[ggᵀ] is then the Fisher information, the second derivative of the
divergence (Martens 2014, arXiv 1412.1193).

The steps ignore correlations between outputs of a layer and between layers. They replace gₜᵢ² by
the product of its marginals. Kronecker-factored approximations (Martens and Grosse 2015, arXiv
1503.05671) have w = 1. Tokens differ too much for that: the loss hardly depends on some tokens
with huge activations.

The forward pass stores the hidden states between blocks. The head gives the gradient of the last
ones, and the backward pass recomputes each block, last block first. Each block is read twice, and
one is in memory at a time.

The second moment of the gradients keeps the correlations of a layer's outputs, with √w instead of w
(:mod:`modulora_core.calibration.token_weights`):

    KL ≈ ½ E[‖gₜ‖² (gₜᵀ ΔW xₜ / ‖gₜ‖)²] ≈ ½ tr(H_O ΔW H ΔWᵀ)      H_O = E[gₜgₜᵀ / ‖gₜ‖]

Tseng, Sun, De Sa 2025 (arXiv 2505.22988) round with both factors of such a product.
"""

from __future__ import annotations

import tempfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from modulora_core import distributed
from modulora_core.calibration.blocks import Block, for_each_block
from modulora_core.calibration.calls import BlockCall, OuterModel
from modulora_core.calibration.gradients import GradientWatch, Sensitivity, check_finite
from modulora_core.calibration.states import SampleStates
from modulora_core.calibration.token_weights import OutputMoments
from modulora_core.models import ModelSource
from modulora_core.models.sites import LinearSite
from modulora_core.progress import Progress, no_progress


def loss_sensitivities(
    source: ModelSource,
    ids: Tensor,
    linears: Sequence[LinearSite],
    *,
    device: torch.device,
    folder: Path,
    seed: int,
    spill: bool | None = None,
    progress: Progress = no_progress,
    moments: OutputMoments | None = None,
) -> dict[str, list[Sensitivity]]:
    """Compute s and w of each of ``linears`` in a decoder block.

    The processes of a distributed run divide the samples as a calibration does. Each sample is
    alone in its passes and draws tokens with a seed of its own. So the number of processes changes
    no bit of w.

    Args:
        ids: all samples, int64 ``[samples, seq_len]``; seed: for the drawn tokens.
        folder: for hidden states in a file, unless ``spill`` is False.
        progress: called with ``"weighing"``, the bytes of ``linears`` done and all of them. Each
            pass counts half.
        moments: keeps H_O of its parameters, which have one matrix each.

    Returns:
        by parameter name, on the CPU: one for the matrix, or one for each expert, with w of this
        process's samples. Means are over all tokens, so an expert with few tokens counts for
        little.

    Raises ModelError, WorkError.
    """
    numbers = distributed.shared_out(range(len(ids)))
    run = _Backpropagation(source, ids[list(numbers)], numbers, linears, device, progress, moments)
    with torch.no_grad(), tempfile.TemporaryFile(dir=folder) as file:  # it has no name
        return run.backward(run.forward(None if spill is False else file, seed), ids.numel())


@dataclass(frozen=True, slots=True)
class _Run:
    """The samples on their way through the model.

    Attributes:
        calls: for each sample, a call of each block.
        states: the hidden state of each sample before each block, and after the last one; the
            backward pass replaces it by its gradient. ``[blocks + 1, samples, seq_len, hidden]``.
    """

    calls: Sequence[Sequence[BlockCall]]
    states: Tensor | SampleStates


@dataclass(frozen=True)
class _Backpropagation:
    """One pass forward and one backward, a sample at a time.

    Attributes:
        ids: this process's samples; numbers: their numbers among the samples of all processes.
    """

    source: ModelSource
    ids: Tensor
    numbers: Sequence[int]
    linears: Sequence[LinearSite]
    device: torch.device
    progress: Progress
    moments: OutputMoments | None

    def forward(self, file: BinaryIO | None, seed: int) -> _Run:
        """Store the hidden states before every block, and the gradient after the last block.

        Args:
            file: for the hidden states; None keeps them in memory.
        """
        outer = OuterModel(self.source, self.device, head=True)
        calls: list[list[BlockCall]] = []
        for sample, (hidden, found) in enumerate(outer.record(self.ids.split(1))):
            if not calls:
                shape = (len(found) + 1, len(self.ids), *hidden.shape[1:])
                states: Tensor | SampleStates = (
                    torch.empty(shape, dtype=hidden.dtype)
                    if file is None
                    else SampleStates(file, hidden, shape)
                )
            states[0, sample] = hidden[0]
            calls.append(found)
        outer.drop_first_block()

        def run(number: int, block: Block) -> None:
            for sample, found in enumerate(calls):
                after = found[number].run(block.module, self._state(states, number, sample))
                states[number + 1, sample] = after[0]
            self._show(number + 1, len(calls[0]))

        for_each_block(self.source, self.linears, self.device, run)
        for sample, found in enumerate(calls):
            hidden = self._state(states, len(found), sample).requires_grad_()
            with torch.enable_grad():
                logits = outer.logits_after(found, self.ids[sample][None], hidden)[0]
            of_sample = zlib.crc32(f"{seed} {self.numbers[sample]}".encode())
            # the gradient of Σ log p(drawn token)
            logits.backward(_ascent(logits.detach(), torch.Generator().manual_seed(of_sample)))
            del logits  # as large as a vocabulary for each token
            states[len(found), sample] = _gradient(hidden)
        return _Run(calls, states)

    def backward(self, run: _Run, tokens: int) -> dict[str, list[Sensitivity]]:
        """From the last block to the first, replace hidden states by the gradient in them.

        Args:
            tokens: the number of tokens of all processes.
        """
        found: dict[str, list[Sensitivity]] = {}

        def work(number: int, block: Block) -> None:
            found.update(self._backward_through(run, number, block, tokens))
            blocks = len(run.calls[0])
            self._show(2 * blocks - number, blocks)

        for_each_block(self.source, self.linears, self.device, work, backward=True)
        distributed.barrier()  # the first process has written all moments
        return found

    def _backward_through(
        self, run: _Run, number: int, block: Block, tokens: int
    ) -> dict[str, list[Sensitivity]]:
        with_moment = self.moments.names if self.moments is not None else frozenset()
        watches = {
            name: [GradientWatch(each, moment=name in with_moment) for each in seen]
            for name, seen in block.weights.items()
        }
        for sample, calls in enumerate(run.calls):
            before = self._state(run.states, number, sample).requires_grad_()
            with torch.enable_grad():
                after = calls[number].run(block.module, before)
                after.backward(self._state(run.states, number + 1, sample))
            run.states[number, sample] = _gradient(before)
            for watch in chain.from_iterable(watches.values()):
                watch.next_sample()
        found = {
            name: [watch.sensitivity(name, tokens, self.numbers) for watch in seen]
            for name, seen in watches.items()
        }
        if self.moments is not None:
            for name in with_moment.intersection(watches):
                self.moments.write(name, watches[name][0].output_moment(name))
        return found

    def _state(self, states: Tensor | SampleStates, number: int, sample: int) -> Tensor:
        """A sample's hidden state before block ``number``, ``[1, seq_len, hidden]``."""
        return states[number, sample][None].to(self.device)

    def _show(self, done: int, blocks: int) -> None:
        """Show ``done`` passes through a block, of two for each of ``blocks``."""
        nbytes = sum(self.source.parameters[linear.name].nbytes for linear in self.linears)
        self.progress("weighing", nbytes * done // (2 * blocks), nbytes)


def _ascent(logits: Tensor, generator: torch.Generator) -> Tensor:
    """The gradient of Σ log p(drawn token) in ``logits``, ``[tokens, vocabulary]``."""
    p = logits.float().softmax(-1)
    check_finite(p.sum(-1), "the model's logits")
    drawn = draw(p, generator)
    ones = torch.ones_like(drawn, dtype=p.dtype)
    return p.neg_().scatter_add_(-1, drawn, ones).to(logits.dtype)


def draw(p: Tensor, generator: torch.Generator) -> Tensor:
    """A random index for each row of probabilities, ``[rows, 1]``.

    A random number is looked up in the sums of a row. ``torch.multinomial`` draws one for each
    probability, which takes most of the time of a large vocabulary's head.
    """
    sums = p.cumsum(-1)
    points = torch.rand(len(p), 1, generator=generator).to(p.device) * sums[:, -1:]
    return torch.searchsorted(sums, points, right=True).clamp(max=p.shape[1] - 1)


def _gradient(leaf: Tensor) -> Tensor:
    """The gradient in ``leaf``, ``[1, seq_len, hidden]``, without the first dimension."""
    assert leaf.grad is not None
    return leaf.grad[0]
