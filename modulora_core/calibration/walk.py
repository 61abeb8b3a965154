"""Takes the samples through a model block by block, and lets each block be packed on the way.

The inputs of a block are the outputs of the quantized blocks before it. In true-sequential order
this holds inside a block too: q, k and v are packed, then o, then gate and up, then down.
One block is dense at a time.

A batch must therefore stop in the middle of a block's forward, wait for packing, and go on:

1.  The forward is the model's own code, and torch has no hook that suspends it.
2.  A greenlet can be suspended: it is a function with a stack of its own, in the same thread.
3.  Each batch runs the block in a greenlet. ``switch()`` starts it or continues it.
4.  Each observed weight passes its input to a listener, which adds it to H.
5.  When all inputs of a stage arrived, the listener switches back to the walk.
6.  The walk does this for each batch, packs the stage, and replaces its weights.
7.  Then it continues each batch: the next product of the batch uses the quantized weights.
8.  A paused batch holds its activations. Batches beyond :data:`PAUSED_BYTES` do not pause.
9.  The walk drops their greenlet at the stop, and runs them from the block's beginning next time.
10. Both ways compute the same products, so they give the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from modulora_core import distributed
from modulora_core.calibration.blocks import Block, block_modules, find_blocks
from modulora_core.calibration.calls import BlockCall, OuterModel
from modulora_core.calibration.passes import Passes
from modulora_core.calibration.stages import Order, TokenWeights
from modulora_core.calibration.states import empty_states
from modulora_core.calibration.text import CalibrationText
from modulora_core.calibration.tuning import Tuner, TuningStates
from modulora_core.calibration.visitor import BlockVisitor, PackedMatrices
from modulora_core.models import ModelSource
from modulora_core.models.sites import LinearSite
from modulora_core.spec import Calibration

PAUSED_BYTES = 2**30
"""The estimated memory for activations of paused batches."""

_Calls = list[list[BlockCall]]
"""By batch: a call of each block."""


@dataclass
class BlockWalk:
    """Takes the samples through a model, block by block.

    The processes of a distributed run divide the samples, sum their H, and divide the packing.

    Attributes:
        linears: the parameters to pack; the walk skips parameters outside of the blocks.
        held_out: the number of held-out samples, the last ones. With any, each calibration is a
            :class:`~modulora_core.calibration.visitor.HeldOutCalibration`.
        held_out_weights: the weights of their tokens in its H.
        token_weights: the weights in H of this process's other samples
            (:func:`modulora_core.calibration.token_weights.token_weights`).
        unreached: after the walk, the experts that no token was routed to.
    """

    source: ModelSource
    text: CalibrationText
    linears: Sequence[LinearSite]
    visitor: BlockVisitor
    device: torch.device
    folder: Path
    tuner: Tuner | None = None
    held_out: int = 0
    held_out_weights: TokenWeights = field(default_factory=dict)
    token_weights: TokenWeights = field(default_factory=dict)
    unreached: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._ids = self.text.ids[distributed.rank() :: distributed.world_size()]
        size, count = self.text.batch_size, len(self._ids)
        self._first_held_out = first = count - self.held_out
        self._batches = [slice(i, min(i + size, first)) for i in range(0, first, size)]
        # held-out samples go alone, as they did when their weights were computed
        self._batches += [slice(i, i + 1) for i in range(first, count)]
        self._orders: dict[tuple[object, ...], tuple[str, Order]] = {}

    @torch.no_grad()
    def run(self) -> None:
        """Pack every block, and tune it if there is a tuner. Raises ModelError, WorkError."""
        paths = find_blocks(self.source.outline)
        states, calls, targets, tuner_calls = self._enter()
        modules = block_modules(self.source, paths)
        for number, path in enumerate(paths):
            of_block = [found[number] for found in calls]
            tuning, last = None, number == len(paths) - 1
            if targets is not None:
                tuning = TuningStates(states, targets, [found[number] for found in tuner_calls])
            self._do_block(path, modules.pop(0), states, of_block, tuning, last=last)

    def _enter(self) -> tuple[Tensor, _Calls, Tensor | None, _Calls]:
        """The hidden states before the first block and all calls.

        Then both for the tuner, if there is one: its targets, and the calls of its batches.
        """
        outer, calls = OuterModel(self.source, self.device, head=False), _Calls()
        recorded = outer.record(self._ids[batch] for batch in self._batches)
        for batch, (hidden, found) in zip(self._batches, recorded, strict=True):
            if not calls:
                states = self._empty_states(hidden)
            states[batch] = hidden
            calls.append(found)
        if self.tuner is not None:
            recorded = outer.record(self._ids[batch] for batch in self.tuner.batches)
            targets = self._empty_states(states).copy_(states)
            return states, calls, targets, [found for _, found in recorded]
        return states, calls, None, []

    def _empty_states(self, hidden: Tensor) -> Tensor:
        shape = (len(self._ids), *hidden.shape[1:])
        return empty_states(hidden, shape, self.folder, self.text.config.spill)

    def _do_block(
        self,
        path: str,
        module: nn.Module,
        states: Tensor,
        calls: Sequence[BlockCall],
        tuning: TuningStates | None,
        *,
        last: bool,
    ) -> None:
        """Fill a block, pack it, tune it, and replace the hidden states by those after it."""
        dense: dict[str, Tensor] = {}  # a tuner changes vectors before they are written
        on_dense = dense.__setitem__ if self.tuner else self.visitor.write_dense
        block = Block(path, module, self.linears, self.source, self.device, on_dense)
        passes = Passes(
            block, states, calls, self._batches, first_held_out=self._first_held_out,
            paused_bytes=PAUSED_BYTES if self.text.config.sequential else 0,
            held_out_weights=self.held_out_weights, token_weights=self.token_weights,
        )  # fmt: skip
        if self.tuner is None or tuning is None:
            written = set(filter(self.visitor.is_written, block.sites))
            self._pack(block, passes, written, self.visitor.write)
        else:
            passes.advance(tuning.targets)  # while the block is dense
            self._pack_and_tune(block, passes, dense, self.tuner, tuning)
        if not last:
            passes.finish()
        passes.discard()

    def _order(self, block: Block, passes: Passes) -> Order:
        """The block's order, which equal blocks share."""
        structure = (type(block.module), *map(block.inside, block.sites))
        if structure not in self._orders:
            order = passes.find_order(sequential=self.text.config.sequential)
            self._orders[structure] = block.path, order
        path, order = self._orders[structure]
        return order.renamed(path, block.path)

    def _pack_and_tune(
        self, block: Block, passes: Passes, dense: Mapping[str, Tensor], tuner: Tuner,
        tuning: TuningStates,
    ) -> None:  # fmt: skip
        """Pack and tune a block, then write it. A block that an earlier run wrote is read."""
        whole = all(map(self.visitor.is_written, (*dense, *block.sites)))
        packed: list[PackedMatrices] = []
        self._pack(block, passes, block.sites if whole else (), packed.append)
        passes.discard()  # paused batches have multiplied by weights that are not tuned
        by_name = {matrices.name: matrices for matrices in packed}
        vectors: Mapping[str, Tensor] = {}
        if whole:
            for name in block.vectors:
                block.replace_vector(name, self.visitor.read_dense(name))
        else:
            tuned, vectors = tuner.tune(tuning, block, by_name)
            by_name |= tuned
        for name, tensor in {**dense, **vectors}.items():
            self.visitor.write_dense(name, tensor)
        for matrices in by_name.values():
            self.visitor.write(matrices)

    def _pack(
        self,
        block: Block,
        passes: Passes,
        written: Collection[str],
        write: Callable[[PackedMatrices], None],
    ) -> None:
        """Pack a block's weights stage by stage; read those that an earlier run has ``written``."""
        wanting = set(filter(self.visitor.wants_calibration, block.sites))
        order = self._order(block, passes)
        for stage in order.stages:
            missing = [name for name in stage if name not in written]
            wanted = wanting.intersection(missing)
            inputs = passes.collect(order, stage) if wanted else None
            for name in missing:
                self.unreached += inputs.unreached(name) if inputs and name in wanted else []
            packed = {}
            for name in distributed.shared_out(missing):
                matrices = [observed.weight for observed in block.weights[name]]
                calibrations: Iterable[Calibration | None] = [None] * len(matrices)
                if inputs and name in wanted:
                    calibrations = inputs.calibrations(name)
                packed[name] = self.visitor.pack(name, matrices, calibrations)
            packed = self._exchanged(packed)
            for name in stage:
                values = self.visitor.read(name) if name in written else packed[name]
                if values is not None:
                    write(values)
                    block.replace(name, values.values())

    def _exchanged(
        self, mine: dict[str, PackedMatrices | None]
    ) -> dict[str, PackedMatrices | None]:
        """The packed parameters of all processes."""
        if distributed.world_size() == 1:
            return mine
        sent = {
            name: None if packed is None else [matrix.to("cpu") for matrix in packed.matrices]
            for name, packed in mine.items()
        }
        others = {
            name: None if matrices is None else self.visitor.received(name, matrices)
            for name, matrices in distributed.merged(sent).items()
            if name not in mine
        }
        return {**mine, **others}
