"""Tuning: after a decoder block was quantized, what is a vector in it is trained, so that the block gives what it gave.

The idea is from Tseng et al. 2024 (arXiv 2402.04396, section 5), for any quantizer that can fold scales into its packed
weights. Codes stay as they are. Of every packed matrix Ŵ of the block a scale of its inputs, u, and of its outputs, v:

    y = v ⊙ (Ŵ (u ⊙ x)) + b

and of the block its norms and biases are trained by gradient descent. The block gets the hidden states that the *quantized*
blocks before it give; its output shall be that of the *unquantized* model. So a block also makes up for errors before it.

Some samples are held out. What is judged on them is what will be stored: scales folded into packed tensors, norms and
biases in their dtype. A block that didn't become better on them stays as it was quantized.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.func import functional_call

from modulora_core.calibration.block import Block
from modulora_core.calibration.blocks import Call
from modulora_core.calibration.states import HiddenStates
from modulora_core.calibration.text import CalibrationText
from modulora_core.packed import ChannelScales

WARMUP = 0.05
"""Share of the steps in which the learning rate rises to its peak; then it falls to 0 along a cosine."""

MAX_GRADIENT_NORM = 1.0
"""Of all that is trained in a block, where the loss is 1 before the first step."""


class HeldBack(Protocol):
    """What tuning asks of who packs: a block's parameters, packed and kept, are written when it is tuned."""

    def is_whole(self, path: str) -> bool:
        """Whether an earlier run wrote all of the block at ``path``."""

    def restore_vector(self, name: str) -> Tensor:
        """A parameter that an earlier run kept, as it is stored."""

    def rescales(self, name: str) -> bool:
        """Whether the packed weight of this name can take scales."""

    def rescale(self, name: str, scales: ChannelScales | None) -> Iterable[Tensor]:
        """Fold scales into a weight as it was packed, or with None take them out; its quantized matrices, in fp32."""

    def keep(self, name: str, tensor: Tensor) -> None:
        """Take a parameter that isn't packed; a second time instead of the first."""

    def tell_tuning(self, step: int, steps: int) -> None:
        """The block is being tuned."""

    def release(self) -> None:
        """Write the block."""


def relative_error(output: Tensor, target: Tensor) -> Tensor:
    """The mean over tokens of ‖y − t‖² / ‖t‖²; y, t: ``[..., hidden]``, computed in fp32.

    Each token counts by itself: those with massive activations, often the first one, would outweigh all others. It is also
    what follows: the next norm divides a token's hidden state by its size.
    """
    y, t = output.to(torch.float32), target.to(torch.float32)
    power = t.square().mean(-1).clamp_min(torch.finfo(torch.float32).tiny)
    return ((y - t).square().mean(-1) / power).mean()


class Tuner:
    """Tunes blocks, one after the other.

    Args:
        text: the samples; its config says how to tune.
        packing: who packs.
        seed: of the order of the samples.

    Attributes:
        batches: the samples of each optimizer step, then those of each batch that is held out.
        errors: of each block's path that was tuned in this run: :func:`relative_error` on the samples held out, before and after.
    """

    def __init__(self, text: CalibrationText, packing: HeldBack, *, seed: int) -> None:
        assert text.config.tuning is not None
        self._config, self._packing, self._seed = text.config.tuning, packing, seed
        self._trained, self._held_out = self._config.batches(*text.ids.shape)
        self.batches = [*self._trained, *self._held_out]
        self.errors: dict[str, tuple[float, float]] = {}

    def begin(
        self, inputs: HiddenStates, targets: HiddenStates, calls: Sequence[Sequence[Call]]
    ) -> None:
        """Take the hidden states, which others advance, and what each block is called with for each of :attr:`batches`."""
        self._inputs, self._targets, self._calls = inputs, targets, calls

    def take_up(self, number: int, block: Block) -> None:
        """Tune a block whose weights are all packed, and let it be written; or take it as an earlier run tuned it.

        Args:
            number: of the block.
            block: its weights have their quantized values. Inputs are the hidden states before it, targets those after it.
        """
        if self._packing.is_whole(block.path):
            for name in block.vectors:
                block.replace_vector(name, self._packing.restore_vector(f"{block.path}.{name}"))
            return
        before = after = self._error(number, block)
        trainee = Trainee(block, self._scaled(block))
        if trainee.parameters() and 0 < before < math.inf:
            self._train(number, block, trainee, before)
            self._fold(block, trainee)
            after = self._error(number, block)
            if not after < before:  # NaN isn't
                self._undo(block, trainee)
                after = before
        self.errors[block.path] = (before, after)
        self._packing.release()

    def _scaled(self, block: Block) -> list[str]:
        """The weights that get scales. A stack of experts gets none: an expert sees few of the samples."""
        return [
            name
            for name, site in block.sites.items()
            if site.experts is None and self._packing.rescales(f"{block.path}.{name}")
        ]

    def _error(self, number: int, block: Block) -> float:
        """On the samples held out, of the block as it is now."""
        total, samples = 0.0, 0
        for call, batch in zip(self._calls[len(self._trained) :], self._held_out, strict=True):
            output = call[number].run(block.module, self._inputs[batch])
            total += float(relative_error(output, self._targets[batch])) * len(output)
            samples += len(output)
        return total / samples

    def _train(self, number: int, block: Block, trainee: Trainee, before: float) -> None:
        steps = self._config.epochs * len(self._trained)
        optimizer = torch.optim.Adam(trainee.groups(self._config.learning_rate))
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, partial(learning_rate_factor, steps=steps)
        )
        for step, i in enumerate(self._order(block.path)):
            batch = self._trained[i]
            with torch.enable_grad():
                output = self._calls[i][number].run(trainee, self._inputs[batch])
                loss = relative_error(output, self._targets[batch]) / before
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trainee.parameters(), MAX_GRADIENT_NORM)
            optimizer.step()
            schedule.step()
            self._packing.tell_tuning(step + 1, steps)

    def _order(self, path: str) -> Iterator[int]:
        """The batch of each step. Each block has a stream of its own, so that a resumed run draws the same numbers."""
        generator = torch.Generator().manual_seed(zlib.crc32(f"{self._seed} {path}".encode()))
        for _ in range(self._config.epochs):
            yield from torch.randperm(len(self._trained), generator=generator).tolist()

    def _fold(self, block: Block, trainee: Trainee) -> None:
        trainee.detach()
        for name, scales in trainee.scales.items():
            block.replace(name, self._packing.rescale(f"{block.path}.{name}", scales))
        for name, vector in trainee.vectors.items():
            self._set(block, name, vector.to(block.vectors[name].dtype))

    def _undo(self, block: Block, trainee: Trainee) -> None:
        for name in trainee.scales:
            block.replace(name, self._packing.rescale(f"{block.path}.{name}", None))
        for name in trainee.vectors:
            self._set(block, name, block.vectors[name])

    def _set(self, block: Block, name: str, value: Tensor) -> None:
        block.replace_vector(name, value)
        self._packing.keep(f"{block.path}.{name}", value.cpu())


class Trainee:
    """A block with what is trained of it, in fp32 whatever the block is computed in; call it as the block.

    Args:
        block: its parameters aren't changed.
        scaled: the names of the weights that get scales.

    Attributes:
        scales: u and v of each of these weights, 1 at first.
        vectors: the block's norms and biases.
    """

    def __init__(self, block: Block, scaled: Sequence[str]) -> None:
        self._module = block.module
        self.scales: dict[str, ChannelScales] = {}
        self._observed = {name: block.weights[name][0] for name in scaled}
        for name, observed in self._observed.items():
            v, u = (torch.ones(n, device=observed.weight.device) for n in observed.weight.shape)
            self.scales[name] = observed.scales = ChannelScales(
                u.requires_grad_(), v.requires_grad_()
            )
        tensors = {**dict(self._module.named_parameters()), **dict(self._module.named_buffers())}
        self._dtypes = {name: tensors[name].dtype for name in block.vectors}
        self.vectors = {
            name: tensors[name].detach().to(torch.float32, copy=True).requires_grad_()
            for name in block.vectors
        }

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        values = {name: vector.to(self._dtypes[name]) for name, vector in self.vectors.items()}
        return functional_call(self._module, values, args, kwargs)

    def parameters(self) -> list[Tensor]:
        """All that is trained."""
        sides = [side for scales in self.scales.values() for side in (scales.input, scales.output)]
        return [*sides, *self.vectors.values()]

    def groups(self, learning_rate: float) -> list[dict[str, Any]]:
        """For the optimizer. Adam's steps don't know how large a parameter is: vectors get steps relative to theirs."""
        sides = [side for scales in self.scales.values() for side in (scales.input, scales.output)]
        groups: list[dict[str, Any]] = [{"params": sides, "lr": learning_rate}] if sides else []
        for vector in self.vectors.values():
            size = float(vector.detach().square().mean().sqrt()) or 1.0  # a bias may be zero
            groups.append({"params": [vector], "lr": learning_rate * size})
        return groups

    def detach(self) -> None:
        """Training is over: let the block be without scales again, and values be values."""
        for observed in self._observed.values():
            observed.scales = None
        for tensor in self.parameters():
            tensor.requires_grad_(False)


def learning_rate_factor(step: int, steps: int) -> float:
    """The share of the peak in step ``step`` of ``steps``, counted from 0."""
    warmup = max(1, math.ceil(WARMUP * steps))
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step + 1 - warmup) / (steps + 1 - warmup)))
