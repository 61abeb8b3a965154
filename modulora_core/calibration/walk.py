"""The samples' way through the decoder blocks: see a layer's inputs, let it be packed, go on with what was packed.

One block is dense at a time. The inputs of a block are what the quantized blocks before it give; in true-sequential
order this holds for the layers within a block too: q, k, v are packed, then o, then gate and up, then down.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from modulora_core.calibration.block import Block, cast, fill, move_buffers
from modulora_core.calibration.blocks import Call, find_blocks, record_calls
from modulora_core.calibration.order import Order
from modulora_core.calibration.passes import Collector, Passes
from modulora_core.calibration.states import DENSE_FILE, FILE, HiddenStates
from modulora_core.calibration.text import CalibrationText
from modulora_core.calibration.tuning import Tuner
from modulora_core.sites import LinearSite
from modulora_core.sources import ModelSource
from modulora_core.spec import Calibration

PAUSED_BYTES = 2**30
"""What the activations of paused batches may take, by estimate."""


class Packing(Protocol):
    """What the walk asks of its caller."""

    def keep(self, name: str, tensor: Tensor) -> None:
        """Take a parameter of a block that isn't packed."""

    def wants_calibration(self, name: str) -> bool:
        """Whether ``name`` is packed with its H."""

    def is_packed(self, name: str) -> bool:
        """Whether an earlier run packed ``name``."""

    def restore(self, name: str) -> Iterable[Tensor]:
        """The quantized matrices of a parameter that an earlier run packed, in fp32, one at a time."""

    def pack(
        self, name: str, matrices: Sequence[Tensor], calibrations: Iterable[Calibration | None]
    ) -> Iterable[Tensor]:
        """Pack a parameter's matrices, ``[out, in]`` each, and give their quantized values back, in fp32, one at a time."""


class BlockWalk:
    """Takes the samples through a model, block by block.

    Args:
        source: the model.
        text: the samples.
        linears: what will be packed; those outside of the blocks aren't seen here.
        device: where blocks are run. On a CPU in fp32, elsewhere in the model's dtype.
        folder: for the hidden states, where they are kept in a file.
        paused_bytes: see :data:`PAUSED_BYTES`.

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
    ) -> None:
        self._source, self._text, self._device, self._folder = source, text, device, folder
        self._paused_bytes = paused_bytes
        self._model = source.skeleton(buffers=True).eval()  # no dropout
        self.blocks = find_blocks(self._model)
        self._sites = {site.name: site for site in linears}
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
                block = filled.pop() if filled else self._fill_block(number, modules[number], packing)
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
        return Passes(block, states, calls, self._batches(), paused_bytes=room)

    def _batches(self) -> list[slice]:
        size, count = self._text.batch_size, len(self._text.ids)
        return [slice(start, min(start + size, count)) for start in range(0, count, size)]

    def _enter(self, blocks: list[nn.Module], stack: ExitStack) -> tuple[HiddenStates, list[list[Call]]]:
        """The hidden states before the first block, and for each batch a call of each block."""
        self._fill_prelude()
        calls: list[list[Call]] = []
        states = None
        for batch in self._batches():
            hidden, found = record_calls(self._model, blocks, self._text.ids[batch].to(self._device))
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

    def _fill_prelude(self) -> None:
        """Fill in what the forward needs before the first block: all outside of the blocks but the output head."""
        head = self._model.get_output_embeddings()
        left_out = [path for path, module in self._model.named_modules() if module is head]
        prefixes = tuple(f"{path}." for path in (*left_out, *self.blocks))
        names = {name for name in self._source.parameters if not name.startswith(prefixes)}
        for name, tensor in self._source.tensors(names=names):
            fill(self._model, name, cast(tensor, self._device))
        move_buffers(self._model, self._device)

    def _fill_block(self, number: int, module: nn.Module, packing: Packing) -> Block:
        path = self.blocks[number]
        prefix = f"{path}."
        sites = {
            name.removeprefix(prefix): site for name, site in self._sites.items() if name.startswith(prefix)
        }
        return Block(path, module, sites, self._source, self._device, packing.keep)

    def _pack_block(self, block: Block, passes: Passes, packing: Packing) -> None:
        """Pack a block's weights stage by stage, or take them from an earlier run."""
        done = {name for name in block.sites if packing.is_packed(f"{block.path}.{name}")}
        if len(done) == len(block.sites):
            for name in done:
                block.replace(name, packing.restore(f"{block.path}.{name}"))
            return
        if block.structure not in self._orders:
            self._orders[block.structure] = passes.order()
        order = self._orders[block.structure]
        for stage in order.stages if self._text.config.sequential else order.merged().stages:
            sums = any(packing.wants_calibration(f"{block.path}.{name}") for name in stage)
            collector = Collector(order, stage, early=not block.has_experts, sums=sums)
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
                block.replace(name, values)

    def _seen(self, block: Block, name: str, collector: Collector) -> Iterator[Calibration]:
        """What was seen of each matrix of a parameter, one at a time: an H of each of many experts is large."""
        full_name = f"{block.path}.{name}"
        for i, observed in enumerate(block.weights[name]):
            moment = collector.moment(observed.key, observed.weight.shape[1], self._device)
            expert = f" of expert {i}" if block.sites[name].experts is not None else ""
            if moment.samples == 0:
                self.unreached.append(f"{full_name}[{i}]")
            yield moment.mean(f"{full_name}{expert}")


def _sharing(found: list[Call], before: Sequence[list[Call]]) -> list[Call]:
    """The calls of one batch, with the objects of the first batch's where they are equal."""
    return [call.sharing(first) for call, first in zip(found, before[0], strict=True)] if before else found
