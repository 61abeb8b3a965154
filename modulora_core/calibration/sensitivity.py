"""How much the loss minds an error in the outputs of each layer, from one backward pass, a decoder block at a time.

Quantizing changes a layer's output at token t by ΔW xₜ. To second order the model's distribution moves by the Kullback-Leibler
divergence, in nats per token,

    KL ≈ ½ E[(gₜᵀ ΔW xₜ)²] ≈ ½ E[Σᵢ gₜᵢ² (ΔW xₜ)ᵢ²] ≈ ½ Σᵢ sᵢ (ΔW H ΔWᵀ)ᵢᵢ          sᵢ = E[gₜᵢ²]    H = E[wₜ xₜ xₜᵀ]    wₜ = ‖gₜ‖² / E‖g‖²

where g is the gradient of -log p(token) in the layer's output, with every token drawn from the model's own distribution: E[ggᵀ] is
then the Fisher information, which is the divergence's second derivative (Martens 2014, arXiv 1412.1193). The steps leave out what
outputs of one layer, and layers, do together, and take gₜᵢ² for a product of its marginals. Kronecker-factored approximations (Martens
and Grosse 2015, arXiv 1503.05671) have w = 1; here tokens differ too much for that: some have huge activations that the loss
hardly depends on.

One pass forward keeps the hidden states between blocks (in a file where they are large), the head gives the gradient of the last
of them, and one pass backward runs each block again, with a gradient, from the last to the first. Each block is read twice;
two are never in memory together.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from modulora_core.calibration.block import Block, fill_outside, sites_within
from modulora_core.calibration.blocks import Call, find_blocks, logits_after, record_calls
from modulora_core.calibration.observe import ObservedWeight
from modulora_core.calibration.states import HiddenStates, spills
from modulora_core.errors import ModelError, WorkError
from modulora_core.models import ModelSource
from modulora_core.models.sites import LinearSite

if TYPE_CHECKING:
    from transformers import PretrainedConfig

FILE = "boundary_states.bin"
"""The hidden states before every block, then the gradients in them."""


@dataclass(frozen=True, slots=True)
class Sensitivity:
    """Of one matrix.

    Attributes:
        outputs: s, fp32 ``[out]``, a mean over all tokens; in nats for a unit of the output, squared.
        tokens: w, for each sample fp32 ``[rows]``, of the inputs that the matrix was multiplied by: all tokens, or those that an expert
            got, in their order. Their mean over all samples is 1, or 0 where there is no gradient.
    """

    outputs: Tensor
    tokens: tuple[Tensor, ...]


def boundary_bytes(
    ids: Tensor, config: PretrainedConfig, device: torch.device, blocks: int, spill: bool | None
) -> int:
    """How large the file of the hidden states will be; 0 where they stay in memory."""
    dtype = torch.float32 if device.type == "cpu" else config.dtype
    nbytes = (blocks + 1) * ids.numel() * config.get_text_config().hidden_size * dtype.itemsize
    return nbytes if spills(nbytes, spill) else 0


def loss_sensitivities(
    source: ModelSource,
    ids: Tensor,
    linears: Sequence[LinearSite],
    *,
    device: torch.device,
    folder: Path,
    seed: int,
    spill: bool | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, list[Sensitivity]]:
    """The s and w of every one of ``linears`` that is in a block.

    Args:
        source: the model.
        ids: samples, int64 ``[samples, seq_len]``.
        linears: the layers.
        device: where blocks are run.
        folder: for the hidden states, where they are kept in a file.
        seed: of the drawn tokens.
        spill: keep them in a file; None decides by their size.
        progress: called with blocks done and their number, each counted twice.

    Returns:
        by parameter name, on the CPU: one for the matrix, or one for each expert. Means are over all tokens, so an expert that
        few tokens reach counts for little.

    Raises:
        ModelError: the model can't be run block by block.
        WorkError: a gradient or the model's logits aren't finite.
    """
    passes = _Passes(source, ids, linears, device, seed, progress or (lambda _done, _total: None))
    with ExitStack() as stack, torch.no_grad():
        passes.forward(folder, spill, stack)
        passes.head()
        return passes.backward()


class _Passes:
    """One pass forward and one backward, a sample at a time."""

    def __init__(
        self,
        source: ModelSource,
        ids: Tensor,
        linears: Sequence[LinearSite],
        device: torch.device,
        seed: int,
        progress: Callable[[int, int], None],
    ) -> None:
        self._source, self._ids, self._linears, self._device = source, ids, linears, device
        self._generator = torch.Generator().manual_seed(seed)
        self._progress = progress
        self._model = source.skeleton(buffers=True).eval()
        self._paths = find_blocks(self._model)
        again = source.skeleton(
            buffers=True
        ).eval()  # modules that aren't filled, for the second time
        self._again = [again.get_submodule(path) for path in self._paths]
        self._calls: list[list[Call]] = []  # of each sample, of each block

    def forward(self, folder: Path, spill: bool | None, stack: ExitStack) -> None:
        """Keep the hidden states before every block, and after the last."""
        modules = [self._model.get_submodule(path) for path in self._paths]
        fill_outside(self._model, self._paths, self._source, self._device, head=True)
        self._model.tie_weights()
        _check_filled(self._model, self._paths)
        block = self._block(0, modules[0])
        for sample, ids in enumerate(self._ids):
            hidden, calls = record_calls(self._model, modules, ids[None].to(self._device))
            if sample == 0:
                self._states = self._room(hidden, folder, spill, stack)
            self._states[self._at(0, sample)] = hidden
            first = self._calls[0] if self._calls else calls
            self._calls.append(
                [call.sharing(other) for call, other in zip(calls, first, strict=True)]
            )
        for number in range(len(modules)):
            block = block if number == 0 else self._block(number, modules[number])
            for sample, calls in enumerate(self._calls):
                before = self._states[self._at(number, sample)]
                self._states[self._at(number + 1, sample)] = calls[number].run(block.module, before)
            block.close()
            self._model.set_submodule(self._paths[number], self._again[number])
            modules[number] = nn.Identity()
            self._progress(number + 1, 2 * len(modules))

    def head(self) -> None:
        """Put the gradient of Σ log p(drawn token) in the place of the last hidden states."""
        for sample, calls in enumerate(self._calls):
            place = self._at(len(self._paths), sample)
            hidden = self._states[place].requires_grad_()
            with torch.enable_grad():
                ids = self._ids[sample][None].to(self._device)
                scores = (
                    logits_after(self._model, self._again, calls, ids, hidden)[0]
                    .float()
                    .log_softmax(-1)
                )
                _check_finite(scores.detach(), "the model's logits")
                drawn = torch.multinomial(scores.detach().exp().cpu(), 1, generator=self._generator)
                scores.gather(-1, drawn.to(scores.device)).sum().backward()
            assert hidden.grad is not None
            self._states[place] = hidden.grad
        del self._model

    def backward(self) -> dict[str, list[Sensitivity]]:
        """From the last block to the first; the gradient before a block takes the place of the one after it."""
        found: dict[str, list[Sensitivity]] = {}
        for number in reversed(range(len(self._paths))):
            block = self._block(number, self._again[number])
            self._again[number] = nn.Identity()
            watches = {
                name: [_Watch(each) for each in matrices]
                for name, matrices in block.weights.items()
            }
            for sample, calls in enumerate(self._calls):
                before = self._states[self._at(number, sample)].requires_grad_()
                with torch.enable_grad():
                    after = calls[number].run(block.module, before)
                    after.backward(self._states[self._at(number + 1, sample)])
                assert before.grad is not None
                self._states[self._at(number, sample)] = before.grad
                for watch in chain.from_iterable(watches.values()):
                    watch.next_sample()
            for name, seen in watches.items():
                full_name = f"{block.path}.{name}"
                found[full_name] = [
                    watch.sensitivity(full_name, self._ids.numel()) for watch in seen
                ]
            block.close()
            self._progress(2 * len(self._paths) - number, 2 * len(self._paths))
        return found

    def _block(self, number: int, module: nn.Module) -> Block:
        path = self._paths[number]
        sites = sites_within(path, self._linears)
        return Block(path, module, sites, self._source, self._device, lambda _name, _tensor: None)

    def _at(self, number: int, sample: int) -> slice:
        """The place of a sample's hidden state before block ``number``."""
        place = number * len(self._ids) + sample
        return slice(place, place + 1)

    def _room(
        self, hidden: Tensor, folder: Path, spill: bool | None, stack: ExitStack
    ) -> HiddenStates:
        count = (len(self._paths) + 1) * len(self._ids)
        states = HiddenStates((count, hidden.shape[1], hidden.shape[2]), hidden.dtype, folder, device=self._device,
                              spill=spill, file=FILE)  # fmt: skip
        stack.callback(states.close)
        return states


class _Watch:
    """Sums up the squared gradients in the outputs of one matrix."""

    def __init__(self, observed: ObservedWeight) -> None:
        weight = observed.weight
        self._outputs = torch.zeros(weight.shape[0], device=weight.device)
        self._pieces: list[
            Tensor
        ] = []  # of this sample: ‖gₜ‖² for the rows of each product, the last product first
        self._tokens: list[Tensor] = []
        observed.watch = self._add

    def _add(self, gradient: Tensor) -> None:
        """``gradient``: ``[..., out]``."""
        squares = gradient.detach().reshape(-1, gradient.shape[-1]).float().square()
        self._outputs += squares.sum(0)
        self._pieces.append(squares.sum(1).cpu())

    def next_sample(self) -> None:
        self._tokens.append(torch.cat(self._pieces[::-1]) if self._pieces else torch.empty(0))
        self._pieces.clear()

    def sensitivity(self, name: str, tokens: int) -> Sensitivity:
        """What was seen in ``tokens`` tokens. Raises WorkError when it isn't finite."""
        _check_finite(self._outputs, f"{name}: its gradient")
        norms = torch.cat(self._tokens).double()
        mean = float(norms.mean()) if len(norms) else 0.0
        scale = 1 / mean if mean > 0 else 0.0
        weights = tuple((each.double() * scale).float() for each in self._tokens)
        return Sensitivity((self._outputs / tokens).cpu(), weights)


def _check_finite(values: Tensor, what: str) -> None:
    if not bool(torch.isfinite(values).all()):
        raise WorkError(
            f"{what}: expected finite numbers on the calibration text, got NaN or Inf; the model overflows on it (try `modulora evaluate` "
            "with the same text)"
        )


def _check_filled(model: nn.Module, blocks: Sequence[str]) -> None:
    inside = tuple(f"{path}." for path in blocks)
    empty = [
        name
        for name, tensor in model.named_parameters()
        if tensor.is_meta and not name.startswith(inside)
    ]
    if empty:
        raise ModelError(
            f"{type(model).__name__}: expected values for {', '.join(empty[:3])}, got none in its files; without them the model's loss "
            "can't be had"
        )
