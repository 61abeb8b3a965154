"""Takes the samples through a model block by block, and lets each block be packed on the way.

The inputs of a block are the outputs of the quantized blocks before it. In true-sequential order
this holds inside a block too: q, k and v are packed, then o, then gate and up, then down.
One block is dense at a time.

A batch must therefore stop in the middle of a block's forward, wait for packing, and go on:

1.  The forward is the model's own code, and torch has no hook that suspends it.
2.  A greenlet can be suspended: it is a function with a stack of its own, in the same thread.
3.  Each batch runs the block in a greenlet. ``switch()`` starts it or continues it.
4.  Each observed weight passes its input to a collector, which adds it to H.
5.  When all inputs of a stage arrived, the collector switches back to the walk.
6.  The walk does this for each batch, packs the stage, and replaces its weights.
7.  Then it continues each batch: the next product of the batch uses the quantized weights.
8.  A paused batch holds its activations. Batches beyond :data:`PAUSED_BYTES` do not pause.
9.  The walk drops their greenlet at the stop, and runs them from the block's beginning next time.
10. Both ways compute the same products, so they give the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from modulora_core.calibration.blocks import (
    Block,
    Call,
    block_modules,
    find_blocks,
    outer_model,
    record_calls,
)
from modulora_core.calibration.packing import PackedMatrices, Packing
from modulora_core.calibration.passes import Collector, Order, Passes, TokenWeights
from modulora_core.calibration.states import empty_states
from modulora_core.calibration.text import CalibrationText
from modulora_core.calibration.tuning import Tuner
from modulora_core.models import ModelSource
from modulora_core.models.sites import LinearSite
from modulora_core.spec import Calibration

PAUSED_BYTES = 2**30
"""The estimated memory for activations of paused batches."""


class BlockWalk:
    """Takes the samples through a model, block by block.

    Args:
        source: the model.
        text: the samples.
        linears: the parameters to pack; the walk skips parameters outside of the blocks.
        device: blocks run there, on a CPU in fp32, elsewhere in the model's dtype.
        folder: for hidden states in a file.
        paused_bytes: see :data:`PAUSED_BYTES`.
        token_weights: holds the last samples out, as many as it has weights for. Then each
            calibration is a :class:`~modulora_core.calibration.packing.HeldOutCalibration`.

    Attributes:
        blocks: dotted paths of the decoder blocks.
        unreached: the experts that no token was routed to.

    Raises:
        ModelError: the model has no decoder blocks.
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
        token_weights: TokenWeights | None = None,
    ) -> None:
        self._source, self._text, self._device, self._folder = source, text, device, folder
        self._linears, self._paused_bytes = tuple(linears), paused_bytes
        self._token_weights = token_weights or {}
        held_out = len(next(iter(token_weights.values()))[0]) if token_weights else 0
        self._first_held_out = len(text.ids) - held_out
        self._orders: dict[tuple[object, ...], Order] = {}
        self.blocks = find_blocks(source.skeleton())
        self.unreached: list[str] = []

    @torch.no_grad()
    def run(self, packing: Packing, tuner: Tuner | None = None) -> None:
        """Pack every block, and tune it if there is a ``tuner``.

        Raises:
            ModelError: the model can't run block by block.
            WorkError: an input of a layer is NaN or Inf; the message names the layer.
        """
        states, calls = self._enter(tuner)
        modules = block_modules(self._source, self.blocks)
        for number in range(len(self.blocks)):
            of_batches = [found[number] for found in calls]
            self._do_block(number, modules.pop(0), states, of_batches, packing, tuner)

    def _enter(self, tuner: Tuner | None) -> tuple[Tensor, list[list[Call]]]:
        """The hidden states before the first block, and for each batch a call of each block."""
        model = outer_model(self._source, self.blocks, self._device, head=False)
        modules = [model.get_submodule(path) for path in self.blocks]
        ids, calls = self._text.ids, list[list[Call]]()
        batches = record_calls(model, modules, ids, self._batches(), self._device)
        for batch, hidden, found in batches:
            if not calls:
                states = self._empty_states(hidden)
            states[batch] = hidden
            calls.append(found)
        if tuner is not None:
            batches = record_calls(model, modules, ids, tuner.batches, self._device)
            targets = self._empty_states(states).copy_(states)
            tuner.begin(states, targets, [found for _, _, found in batches])
        return states, calls

    def _empty_states(self, hidden: Tensor) -> Tensor:
        shape = (len(self._text.ids), *hidden.shape[1:])
        spill = self._text.config.spill
        return empty_states(shape, hidden.dtype, self._device, self._folder, spill)

    def _batches(self) -> list[slice]:
        """Held-out samples go alone, as they did when their weights were computed."""
        size, count, first = self._text.batch_size, len(self._text.ids), self._first_held_out
        calibrating = [slice(start, min(start + size, first)) for start in range(0, first, size)]
        return calibrating + [slice(i, i + 1) for i in range(first, count)]

    def _do_block(
        self,
        number: int,
        module: nn.Module,
        states: Tensor,
        calls: Sequence[Call],
        packing: Packing,
        tuner: Tuner | None,
    ) -> None:
        """Fill a block, pack it, tune it, and replace the hidden states by those after it."""
        dense: dict[str, Tensor] = {}  # a tuner changes vectors before they are written
        keep: Callable[[str, Tensor], None] = packing.keep if tuner is None else dense.__setitem__
        path = self.blocks[number]
        block = Block(path, module, self._linears, self._source, self._device, keep)
        may_pause = self._text.config.sequential and not block.has_experts
        passes = Passes(
            block,
            states,
            calls,
            self._batches(),
            paused_bytes=self._paused_bytes if may_pause else 0,
            first_held_out=self._first_held_out,
            device=self._device,
        )
        if tuner is None:
            written = {name for name in block.sites if packing.is_written(f"{path}.{name}")}
            self._pack(block, passes, packing, written, packing.write)
        else:
            passes.advance(tuner.targets)  # while the block is dense
            self._pack_and_tune(number, block, passes, packing, tuner, dense)
        if number < len(self.blocks) - 1:
            passes.finish()
        passes.discard()

    def _pack_and_tune(
        self,
        number: int,
        block: Block,
        passes: Passes,
        packing: Packing,
        tuner: Tuner,
        dense: dict[str, Tensor],
    ) -> None:
        """Pack and tune a block, then write it. A block that an earlier run wrote is read."""
        prefix, packed = f"{block.path}.", list[PackedMatrices]()
        names = [*dense, *(prefix + name for name in block.sites)]
        whole = all(packing.is_written(name) for name in names)
        self._pack(block, passes, packing, block.sites if whole else (), packed.append)
        passes.discard()  # paused batches have multiplied by weights that are not tuned
        by_name = {matrices.name.removeprefix(prefix): matrices for matrices in packed}
        if whole:
            for name in block.vectors:
                block.replace_vector(name, packing.read_kept(prefix + name))
        else:
            tuned, vectors = tuner.tune(number, block, by_name, packing.tell_tuning)
            by_name |= tuned
            dense |= {prefix + name: value.cpu() for name, value in vectors.items()}
        for name, tensor in dense.items():
            packing.keep(name, tensor)
        for matrices in by_name.values():
            packing.write(matrices)

    def _pack(
        self,
        block: Block,
        passes: Passes,
        packing: Packing,
        written: Collection[str],
        write: Callable[[PackedMatrices], None],
    ) -> None:
        """Pack a block's weights stage by stage; read those that an earlier run has ``written``."""
        full_names = {name: f"{block.path}.{name}" for name in block.sites}
        wanting = {name for name in block.sites if packing.wants_calibration(full_names[name])}
        weights = {n: self._token_weights[f] for n, f in full_names.items() if self._token_weights}
        order = self._order(block, passes)
        for stage in order.stages:
            collector = Collector(
                order, stage, stops=not block.has_experts, weights=weights, device=self._device
            )
            if wanting.intersection(stage).difference(written):
                passes.collect(collector)
            for name in stage:
                if name in written:
                    packed = packing.read(full_names[name])
                else:
                    matrices = [observed.weight for observed in block.weights[name]]
                    found = self._calibrations(block, name, collector if name in wanting else None)
                    packed = packing.pack(full_names[name], matrices, found)
                if packed is not None:
                    write(packed)
                    block.replace(name, packed.values())

    def _order(self, block: Block, passes: Passes) -> Order:
        if block.structure not in self._orders:
            order = passes.order()
            sequential = self._text.config.sequential
            self._orders[block.structure] = order if sequential else order.merged()
        return self._orders[block.structure]

    def _calibrations(
        self, block: Block, name: str, collector: Collector | None
    ) -> Iterator[Calibration | None]:
        """H of each matrix of a parameter, one at a time: H of many experts is large."""
        for i, observed in enumerate(block.weights[name]):
            if collector is None:
                yield None
                continue
            layer = f"{block.path}.{name}"
            expert = f" of expert {i}" if block.sites[name].experts is not None else ""
            found = collector.calibration(observed.key, observed.weight, f"{layer}{expert}")
            if found.samples == 0:
                self.unreached.append(f"{layer}[{i}]")
            yield found
