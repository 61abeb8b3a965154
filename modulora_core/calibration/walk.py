"""The samples' way through the decoder blocks: see a layer's inputs, let it be packed, go on with what was packed.

One block is dense at a time. The inputs of a block are what the quantized blocks before it give; in true-sequential
order this holds for the layers within a block too: q, k, v are packed, then o, then gate and up, then down.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from modulora_core.calibration.block import Block, fill_outside, sites_within
from modulora_core.calibration.blocks import Call, find_blocks, record_calls
from modulora_core.calibration.observe import Key
from modulora_core.calibration.order import Order
from modulora_core.calibration.passes import Collector, Passes
from modulora_core.calibration.states import DENSE_FILE, FILE, HiddenStates
from modulora_core.calibration.text import CalibrationText
from modulora_core.calibration.tuning import Tuner
from modulora_core.models import ModelSource
from modulora_core.models.sites import LinearSite
from modulora_core.spec import Calibration

PAUSED_BYTES = 2**30
"""What the activations of paused batches may take, by estimate."""


@dataclass(frozen=True, slots=True)
class HeldOutCalibration(Calibration):
    """What was seen of one layer, and apart from it what was seen of samples that are held out: to judge by.

    Attributes:
        held_out: of these samples, with their inputs weighted; no ``samples`` where no token of them reached an expert.
    """

    held_out: Calibration


class Packing(Protocol):
    """What the walk asks of its caller."""

    def keep(self, name: str, tensor: Tensor) -> None:
        """Take a parameter of a block that isn't packed."""

    def wants_calibration(self, name: str) -> bool:
        """Whether ``name`` is packed with its H."""

    def is_packed(self, name: str) -> bool:
        """Whether an earlier run packed ``name``."""

    def restore(self, name: str) -> Iterable[Tensor] | None:
        """The quantized matrices of a parameter that an earlier run packed, in fp32, one at a time; None to go on as they are."""

    def pack(
        self, name: str, matrices: Sequence[Tensor], calibrations: Iterable[Calibration | None]
    ) -> Iterable[Tensor] | None:
        """Pack a parameter's matrices, ``[out, in]`` each, and give their quantized values back, in fp32, one at a time; or
        None to go on with these.
        """


class BlockWalk:
    """Takes the samples through a model, block by block.

    Args:
        source: the model.
        text: the samples.
        linears: what will be packed; those outside of the blocks aren't seen here.
        device: where blocks are run. On a CPU in fp32, elsewhere in the model's dtype.
        folder: for the hidden states, where they are kept in a file.
        paused_bytes: see :data:`PAUSED_BYTES`.
        held_out: by name of a parameter and matrix, the weights of the inputs in each of the last samples: these samples are held out, and
            what is packed is given a :class:`HeldOutCalibration`, whose ``hessian`` is of the others.

    Attributes:
        blocks: dotted paths of the decoder blocks.
        unreached: the experts that no token was routed to.

    Raises:
        ModelError: no decoder blocks are found.
    """

    def __init__(
        self,
        source: ModelSource,
        text: CalibrationText,
        linears: Sequence[LinearSite],
        *,
        device: torch.device,
        folder: Path,
        paused_bytes: int = PAUSED_BYTES,
        held_out: Mapping[str, Sequence[Sequence[Tensor]]] | None = None,
    ) -> None:
        self._source, self._text, self._device, self._folder = source, text, device, folder
        self._held_out = held_out
        count = 0 if not held_out else len(next(iter(held_out.values()))[0])
        self._first_held_out = len(text.ids) - count
        self._paused_bytes = paused_bytes
        self._model = source.skeleton(buffers=True).eval()  # no dropout
        self.blocks = find_blocks(self._model)
        self._linears = tuple(linears)
        self._orders: dict[tuple[object, ...], Order] = {}
        self.unreached: list[str] = []

    @torch.no_grad()
    def run(self, packing: Packing, tuner: Tuner | None = None) -> None:
        """Pack every block, and with a ``tuner`` tune it then.

        Raises:
            ModelError: the model can't be run block by block.
            WorkError: NaN or Inf in a layer's inputs; the message names it.
        """
        modules = [self._model.get_submodule(path) for path in self.blocks]
        filled = [
            self._fill_block(0, modules[0], packing)
        ]  # the model's forward runs it to learn what it returns
        with ExitStack() as stack:
            states, calls = self._enter(modules, stack)
            targets = None if tuner is None else self._begin(tuner, states, modules, stack)
            del self._model  # the embeddings aren't needed any more
            for number in range(len(modules)):
                block = (
                    filled.pop() if filled else self._fill_block(number, modules[number], packing)
                )
                modules[number] = nn.Identity()
                passes = self._passes(block, states, [found[number] for found in calls])
                if targets is not None:
                    passes.advance(targets)  # while the block is dense
                self._pack_block(block, passes, packing)
                if tuner is not None:
                    passes.begin_again()  # what pauses has seen weights that aren't tuned
                    tuner.take_up(number, block)
                if number < len(modules) - 1:
                    passes.finish()
                passes.close()
                block.close()

    def _passes(self, block: Block, states: HiddenStates, calls: Sequence[Call]) -> Passes:
        may_pause = self._text.config.sequential and not block.has_experts
        room = self._paused_bytes if may_pause else 0
        return Passes(
            block, states, calls, self._batches(), paused_bytes=room, held_out=self._first_held_out
        )  # fmt: skip

    def _batches(self) -> list[slice]:
        """Samples that are held out go alone, as they did when their weights were found."""
        size, count, first = self._text.batch_size, len(self._text.ids), self._first_held_out
        calibrating = [slice(start, min(start + size, first)) for start in range(0, first, size)]
        return calibrating + [slice(i, i + 1) for i in range(first, count)]

    def _enter(
        self, blocks: list[nn.Module], stack: ExitStack
    ) -> tuple[HiddenStates, list[list[Call]]]:
        """The hidden states before the first block, and for each batch a call of each block."""
        fill_outside(self._model, self.blocks, self._source, self._device, head=False)
        calls: list[list[Call]] = []
        states = None
        for batch in self._batches():
            hidden, found = record_calls(
                self._model, blocks, self._text.ids[batch].to(self._device)
            )
            if states is None:
                states = self._states(hidden, FILE, stack)
            states[batch] = hidden
            calls.append(_sharing(found, calls))
        assert states is not None
        return states, calls

    def _begin(
        self, tuner: Tuner, states: HiddenStates, blocks: list[nn.Module], stack: ExitStack
    ) -> HiddenStates:
        """The unquantized model's hidden states, which are the same before the first block."""
        calls: list[list[Call]] = []
        for batch in tuner.batches:
            _, found = record_calls(self._model, blocks, self._text.ids[batch].to(self._device))
            calls.append(_sharing(found, calls))
        targets = self._states(states[slice(0, 1)], DENSE_FILE, stack)
        targets.copy_(states)
        tuner.begin(states, targets, calls)
        return targets

    def _states(self, hidden: Tensor, file: str, stack: ExitStack) -> HiddenStates:
        """Room for all samples' hidden states, of which ``hidden`` are some."""
        shape = (len(self._text.ids), hidden.shape[1], hidden.shape[2])
        states = HiddenStates(shape, hidden.dtype, self._folder, device=self._device,
                              spill=self._text.config.spill, file=file)  # fmt: skip
        stack.callback(states.close)
        return states

    def _fill_block(self, number: int, module: nn.Module, packing: Packing) -> Block:
        path = self.blocks[number]
        return Block(
            path,
            module,
            sites_within(path, self._linears),
            self._source,
            self._device,
            packing.keep,
        )

    def _pack_block(self, block: Block, passes: Passes, packing: Packing) -> None:
        """Pack a block's weights stage by stage, or take them from an earlier run."""
        done = {name for name in block.sites if packing.is_packed(f"{block.path}.{name}")}
        if len(done) == len(block.sites):
            for name in done:
                _replace(block, name, packing.restore(f"{block.path}.{name}"))
            return
        if block.structure not in self._orders:
            self._orders[block.structure] = passes.order()
        order = self._orders[block.structure]
        for stage in order.stages if self._text.config.sequential else order.merged().stages:
            sums = any(packing.wants_calibration(f"{block.path}.{name}") for name in stage)
            collector = Collector(
                order, stage, early=not block.has_experts, sums=sums, token_weights=self._token_weights(block)
            )  # fmt: skip
            if sums:
                passes.collect(collector)
            for name in stage:
                full_name = f"{block.path}.{name}"
                if name in done:
                    values = packing.restore(full_name)
                else:
                    matrices = [observed.weight for observed in block.weights[name]]
                    wanted = packing.wants_calibration(full_name)
                    seen = self._seen(block, name, collector) if wanted else [None] * len(matrices)
                    values = packing.pack(full_name, matrices, seen)
                _replace(block, name, values)

    def _token_weights(self, block: Block) -> dict[Key, Sequence[Tensor]]:
        if self._held_out is None:
            return {}
        return {
            Key(name, i): weights
            for name in block.sites
            for i, weights in enumerate(self._held_out[f"{block.path}.{name}"])
        }

    def _seen(self, block: Block, name: str, collector: Collector) -> Iterator[Calibration]:
        """What was seen of each matrix of a parameter, one at a time: an H of each of many experts is large."""
        full_name = f"{block.path}.{name}"
        for i, observed in enumerate(block.weights[name]):
            moment = collector.moment(observed.key, observed.weight.shape[1], self._device)
            expert = f" of expert {i}" if block.sites[name].experts is not None else ""
            if moment.samples == 0:
                self.unreached.append(f"{full_name}[{i}]")
            seen = moment.mean(f"{full_name}{expert}")
            if self._held_out is not None:
                other = collector.held_out(observed.key, observed.weight.shape[1], self._device)
                seen = HeldOutCalibration(
                    seen.hessian, seen.samples, other.mean(f"{full_name}{expert}")
                )
            yield seen


def _replace(block: Block, name: str, values: Iterable[Tensor] | None) -> None:
    if values is not None:
        block.replace(name, values)


def _sharing(found: list[Call], before: Sequence[list[Call]]) -> list[Call]:
    """The calls of one batch, with the objects of the first batch's where they are equal."""
    return (
        [call.sharing(first) for call, first in zip(found, before[0], strict=True)]
        if before
        else found
    )
