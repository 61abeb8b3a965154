"""Tunes a quantized block: trains its vectors until its output is close to the dense block's.

Tseng et al. 2024 (arXiv 2402.04396, section 5) do so for their quantizer. Here any quantizer is
tuned that can fold scales into its packed weights. Codes stay fixed. Each packed matrix Ŵ gets a
scale of its inputs, u, and a scale of its outputs, v:

    y = v ⊙ (Ŵ (u ⊙ x)) + b

Gradient descent trains u, v, and the block's norms and biases. The block's input
comes from the *quantized* blocks before it, its target from the *dense* model. So a block also
corrects errors of the blocks before it.

The last samples are held out. They judge the values that will be stored: with scales folded into
packed tensors, and vectors in their dtype. A block without a smaller error stays as it was.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call

from modulora_core.calibration.blocks import Block
from modulora_core.calibration.calls import BlockCall
from modulora_core.calibration.visitor import PackedMatrices
from modulora_core.errors import DataError, OptionError
from modulora_core.layers import ChannelScales

EPOCHS = 5
LEARNING_RATE = 5e-3
STEP_TOKENS = 512
"""Tokens in an optimizer step. Small steps are more steps, and hold fewer activations."""

_HELD_OUT_EVERY = 16
"""Tuning holds one of so many samples out; at least one."""

WARMUP = 0.05
"""The share of steps with a rising learning rate. It then falls to 0 along a cosine."""

MAX_GRADIENT_NORM = 1.0
"""The bound for a block's whole gradient. The loss is 1 before the first step."""


@dataclass(frozen=True, slots=True)
class TuningConfig:
    """Selects how each decoder block is tuned after it was quantized.

    Attributes:
        epochs: passes over the calibration samples for each block; 0 does not tune.
        learning_rate: Adam's peak rate, for factors near 1. A step changes them by about this.
        batch_size: samples in an optimizer step; None takes about :data:`STEP_TOKENS` tokens.

    Raises OptionError: a number is out of its range.
    """

    epochs: int = EPOCHS
    learning_rate: float = LEARNING_RATE
    batch_size: int | None = None

    def __post_init__(self) -> None:
        if self.epochs < 0:
            raise OptionError(f"tuning epochs: expected 0 (no tuning) or more, got {self.epochs}")
        if not (math.isfinite(self.learning_rate) and self.learning_rate > 0):
            raise OptionError(
                f"tuning learning_rate: expected a positive number, got {self.learning_rate}"
            )
        if self.batch_size is not None and self.batch_size < 1:
            raise OptionError(f"tuning batch_size: expected at least 1, got {self.batch_size}")

    def batches(self, samples: int, seq_len: int) -> tuple[list[slice], list[slice]]:
        """The samples of each optimizer step, and of each held-out batch. Raises DataError."""
        if samples < 2:
            raise DataError(
                "tuning: expected at least 2 calibration samples, one of them to judge by, got "
                f"{samples}; give more text or shorter samples (seq_len)"
            )
        size = self.step_samples(seq_len)
        trained = samples - max(1, samples // _HELD_OUT_EVERY)
        return _slices(0, trained, size), _slices(trained, samples, size)

    def step_samples(self, seq_len: int) -> int:
        """Samples in an optimizer step."""
        return self.batch_size or max(1, STEP_TOKENS // seq_len)

    def to_json(self, seq_len: int) -> dict[str, Any]:
        """The entry in the checkpoint's record."""
        return {
            "epochs": self.epochs,
            "learning_rate": self.learning_rate,
            "batch_size": self.step_samples(seq_len),
        }


def _slices(start: int, stop: int, size: int) -> list[slice]:
    return [slice(first, min(first + size, stop)) for first in range(start, stop, size)]


def relative_error(output: Tensor, target: Tensor) -> Tensor:
    """The mean over tokens of ‖y − t‖² / ‖t‖²; y, t: ``[..., hidden]``, computed in fp32.

    Every token counts alike. Otherwise a few tokens with massive activations, often the first
    one, would outweigh all others. The next norm divides a token by its size too.
    """
    y, t = output.to(torch.float32), target.to(torch.float32)
    power = t.square().mean(-1).clamp_min(torch.finfo(torch.float32).tiny)
    return ((y - t).square().mean(-1) / power).mean()


@dataclass(frozen=True, slots=True)
class TuningStates:
    """The calibration samples at one block.

    Attributes:
        inputs: the hidden states of the quantized model before the block,
            ``[samples, seq_len, hidden]``.
        targets: the hidden states of the dense model after the block, the same shape.
        calls: a call of the block for each of :attr:`Tuner.batches`.
    """

    inputs: Tensor
    targets: Tensor
    calls: Sequence[BlockCall]

    def of(self, batch: slice, device: torch.device) -> tuple[Tensor, Tensor]:
        """The inputs and the targets of a batch, on a device."""
        return self.inputs[batch].to(device), self.targets[batch].to(device)


class Tuner:
    """Tunes blocks, one after the other.

    Attributes:
        batches: the samples of each optimizer step, then of each held-out batch.
        errors: by the path of each tuned block, :func:`relative_error` on held-out samples before
            and after.
    """

    def __init__(
        self, config: TuningConfig, ids: Tensor, *, seed: int, progress: Callable[[], None]
    ) -> None:
        self._config, self._seed, self._progress = config, seed, progress
        self._trained, self._held_out = config.batches(*ids.shape)
        self.batches = [*self._trained, *self._held_out]
        self.errors: dict[str, tuple[float, float]] = {}

    def tune(
        self, states: TuningStates, block: Block, packed: Mapping[str, PackedMatrices]
    ) -> tuple[dict[str, PackedMatrices], dict[str, Tensor]]:
        """Tune a block whose weights have their quantized values.

        Returns:
            the packed parameters and the vectors that changed, by name.
        """
        before = after = self._error(states, block)
        tuned, vectors = dict[str, PackedMatrices](), dict[str, Tensor]()
        # experts get no scales: each sees too few samples
        scaled = [name for name, site in block.sites.items()
                  if site.experts is None and packed[name].quantizer.spec.rescales]  # fmt: skip
        if (scaled or block.vectors) and 0 < before < math.inf:
            scales, trained = self._train(states, block, scaled, before)
            tuned = {name: packed[name].rescaled(u_v) for name, u_v in scales.items()}
            vectors = {n: v.to(block.vectors[n].dtype).cpu() for n, v in trained.items()}
            _replace(block, tuned, vectors)
            after = self._error(states, block)
            if not after < before:  # NaN is not
                _replace(block, {name: packed[name] for name in tuned}, block.vectors)
                after, tuned, vectors = before, {}, {}
        self.errors[block.path] = (before, after)
        return tuned, vectors

    def _error(self, states: TuningStates, block: Block) -> float:
        """The error of the block as it is, on the held-out samples."""
        total, samples = 0.0, 0
        for call, batch in zip(states.calls[len(self._trained) :], self._held_out, strict=True):
            inputs, targets = states.of(batch, block.device)
            output = call.run(block.module, inputs)
            total += float(relative_error(output, targets)) * len(output)
            samples += len(output)
        return total / samples

    def _train(
        self, states: TuningStates, block: Block, scaled: Sequence[str], before: float
    ) -> tuple[dict[str, ChannelScales], dict[str, Tensor]]:
        """Train scales of the weights in ``scaled`` and the block's vectors, all in fp32."""
        scales = {name: _ones(block.weights[name][0].weight) for name in scaled}
        vectors = {
            name: vector.to(block.device, torch.float32, copy=True).requires_grad_()
            for name, vector in block.vectors.items()
        }
        dtypes = {name: block.computed(vector).dtype for name, vector in block.vectors.items()}

        def run(*args: Any, **kwargs: Any) -> Any:
            values = {block.inside(name): v.to(dtypes[name]) for name, v in vectors.items()}
            return functional_call(block.module, values, args, kwargs)

        sides = [side for each in scales.values() for side in (each.input, each.output)]
        for name, each in scales.items():
            block.weights[name][0].scales = each
        trained = [*sides, *vectors.values()]
        groups = self._groups(sides, vectors.values())
        self._descend(states, block, run, groups, trained, before)
        for name in scales:
            block.weights[name][0].scales = None
        for tensor in trained:
            tensor.requires_grad_(False)
        return scales, vectors

    def _descend(
        self,
        states: TuningStates,
        block: Block,
        run: Callable[..., Any],
        groups: list[dict[str, Any]],
        trained: Sequence[Tensor],
        before: float,
    ) -> None:
        """Minimise the error of ``run``, which is ``before`` at the beginning, by Adam."""
        optimizer = torch.optim.Adam(groups)
        steps = self._config.epochs * len(self._trained)
        factor = partial(learning_rate_factor, steps=steps)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        for i in self._order(block.path):
            inputs, targets = states.of(self._trained[i], block.device)
            with torch.enable_grad():
                output = states.calls[i].run(run, inputs)
                loss = relative_error(output, targets) / before
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, MAX_GRADIENT_NORM)
            optimizer.step()
            schedule.step()
            self._progress()

    def _groups(self, sides: Sequence[Tensor], vectors: Iterable[Tensor]) -> list[dict[str, Any]]:
        """Adam's groups. Adam ignores a parameter's size, so the rate of a vector follows it."""
        rate = self._config.learning_rate
        groups: list[dict[str, Any]] = [{"params": sides, "lr": rate}] if sides else []
        for vector in vectors:
            size = float(vector.detach().square().mean().sqrt()) or 1.0  # a bias may be zero
            groups.append({"params": [vector], "lr": rate * size})
        return groups

    def _order(self, path: str) -> Iterator[int]:
        """The batch of each step. Each block has its own seed, so a resumed run draws the same."""
        generator = torch.Generator().manual_seed(zlib.crc32(f"{self._seed} {path}".encode()))
        for _ in range(self._config.epochs):
            yield from torch.randperm(len(self._trained), generator=generator).tolist()


def _ones(weight: Tensor) -> ChannelScales:
    out_features, in_features = weight.shape
    u, v = (weight.new_ones(n, dtype=torch.float32) for n in (in_features, out_features))
    return ChannelScales(u.requires_grad_(), v.requires_grad_())


def _replace(
    block: Block, packed: Mapping[str, PackedMatrices], vectors: Mapping[str, Tensor]
) -> None:
    for name, matrices in packed.items():
        block.replace(name, matrices.values())
    for name, value in vectors.items():
        block.replace_vector(name, value)


def learning_rate_factor(step: int, steps: int) -> float:
    """The share of the peak rate in ``step`` of ``steps``, counted from 0."""
    warmup = max(1, math.ceil(WARMUP * steps))
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step + 1 - warmup) / (steps + 1 - warmup)))
