"""Packs a model's parameters into the files of a checkpoint."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from modulora_core import distributed
from modulora_core.calibration import BlockVisitor, BlockWalk, PackedMatrices, Tuner, block_prefixes
from modulora_core.calibration.sensitivity import loss_sensitivities
from modulora_core.calibration.stages import TokenWeights
from modulora_core.calibration.states import spilled_bytes
from modulora_core.calibration.token_weights import OutputMoments, moment_bytes, token_weights
from modulora_core.checkpoints.packing import pack_matrices
from modulora_core.checkpoints.shards import ShardWriter
from modulora_core.dense_products import has_bfloat16_units, matmul_precision
from modulora_core.models import ModelSource
from modulora_core.progress import Progress
from modulora_core.quantization.layout import Layout
from modulora_core.spec import Calibration, PackedWeight

WEIGHTING = "weighting"
"""The folder of token weights and second moments of gradients, in an unfinished folder."""


@dataclass(frozen=True, slots=True)
class PackingOutcome:
    """The outcome of packing a model.

    Attributes:
        unreached: the experts that no calibration token was routed to.
        tuning_errors: by block tuned in this run, the error on held-out samples before and after
            (:func:`modulora_core.calibration.tuning.relative_error`); None without tuning.
    """

    unreached: Sequence[str] = ()
    tuning_errors: dict[str, tuple[float, float]] | None = None


def disk_bytes(source: ModelSource, layout: Layout, device: torch.device) -> int:
    """The largest size of all files to write: checkpoint, hidden states, and moments."""
    text = layout.calibration
    if text is None:
        return layout.nbytes
    tokens, spill = text.ids.numel(), text.config.spill
    files = 1 if text.config.tuning is None else 2  # the dense model's hidden states too
    nbytes = layout.nbytes + files * spilled_bytes(tokens, source.config, device, spill)
    if text.config.weighting == "loss":
        states = len(block_prefixes(source)) + 1
        nbytes += spilled_bytes(states * tokens, source.config, device, spill is not False)
        nbytes += sum(
            moment_bytes(entry.linear)
            for entry in layout.packed.values()
            if entry.uses_output_moment
        )
    return nbytes


def pack_all(
    source: ModelSource,
    layout: Layout,
    writer: ShardWriter,
    device: torch.device,
    progress: Progress,
) -> PackingOutcome:
    """Write every parameter of ``source``, a parameter or, with calibration, a block at a time.

    Parameters that ``writer`` has already are not packed again; with tuning, whole blocks.

    Raises ModelError, WorkError.
    """
    text, tuner = layout.calibration, None
    weights, moments = _weigh(source, layout, writer.folder, device, progress)
    packer = _Packer(source, layout, writer, device, progress, moments)
    inside = () if text is None else block_prefixes(source)
    outside = {name for name in source.parameters if not name.startswith(inside)}
    if distributed.is_first():  # reading takes most of the time
        for name, tensor in source.tensors(names=outside):
            packer.take(name, tensor)
    if text is None:
        return PackingOutcome()
    if text.config.tuning is not None:
        progress = partial(packer.tell, "tuning")
        tuner = Tuner(text.config.tuning, text.ids, seed=layout.record.seed, progress=progress)
    walk = BlockWalk(
        source, text, [entry.linear for entry in layout.packed.values()], packer, device,
        writer.folder, tuner, token_weights=weights,
    )  # fmt: skip
    walk.run()
    return PackingOutcome(walk.unreached, None if tuner is None else tuner.errors)


def _weigh(
    source: ModelSource, layout: Layout, folder: Path, device: torch.device, progress: Progress
) -> tuple[TokenWeights, OutputMoments]:
    """Weight the tokens of the calibration by the loss, if it asks for that.

    Args:
        folder: the unfinished folder; the results are kept below it for a resumed run.

    Returns:
        the weights, and H_O of the parameters whose quantizers use it; both empty without.
    """
    text, folder = layout.calibration, folder / WEIGHTING
    if text is None or text.config.weighting != "loss":
        return {}, OutputMoments(folder, frozenset())
    # without experts: quantized layers route other tokens to them than dense layers do
    linears = [
        entry.linear for entry in layout.packed.values()
        if entry.in_block and entry.linear.experts is None and entry.quantizer.wants_calibration
    ]  # fmt: skip
    with_moment = [name for name, entry in layout.packed.items() if entry.uses_output_moment]
    moments = OutputMoments(folder, frozenset(with_moment))
    if not linears:
        return {}, moments
    measure = partial(
        loss_sensitivities, source, text.ids, linears, device=device, folder=folder,
        seed=layout.record.seed, spill=text.config.spill, progress=progress, moments=moments,
    )  # fmt: skip
    # an error of bf16 is less than that of drawing tokens
    fast = device.type != "cpu" or has_bfloat16_units()
    with matmul_precision("medium" if fast else None):
        return token_weights(text.ids, folder, measure), moments


@dataclass
class _Packer(BlockVisitor):
    """Packs parameters and writes them. Progress counts bytes of dense parameters."""

    source: ModelSource
    layout: Layout
    writer: ShardWriter
    device: torch.device
    progress: Progress
    moments: OutputMoments
    done_bytes: int = 0

    def __post_init__(self) -> None:
        self._total = sum(info.nbytes for info in self.source.parameters.values())

    def take(self, name: str, tensor: Tensor) -> None:
        """Write a parameter that needs no calibration, packed or dense, as the model stores it."""
        entry = self.layout.packed.get(name)
        if entry is None:
            self.write_dense(name, tensor)
        elif self.is_written(name):
            self._count(name)
        else:
            matrices = entry.site.matrices(tensor)
            self.write(self.pack(name, matrices, [None] * len(matrices)))

    def is_written(self, name: str) -> bool:
        return name in self.writer.done

    def write_dense(self, name: str, tensor: Tensor) -> None:
        if not self.is_written(name):
            self.writer.write(name, {name: tensor})
        self._count(name)

    def wants_calibration(self, name: str) -> bool:
        return self.layout.packed[name].quantizer.wants_calibration

    def pack(
        self, name: str, matrices: Sequence[Tensor], calibrations: Iterable[Calibration | None]
    ) -> PackedMatrices:
        entry, seed = self.layout.packed[name], self.layout.record.seed
        on_device = (matrix.to(self.device) for matrix in matrices)
        given = self._completed(name, calibrations, len(matrices))
        packed = pack_matrices(name, entry.site, entry.quantizer, on_device, given, seed=seed)
        self._count(name)
        return PackedMatrices(name, entry.quantizer, packed)

    def _completed(
        self, name: str, calibrations: Iterable[Calibration | None], number: int
    ) -> Iterator[Calibration | None]:
        """The calibrations of a parameter's matrices, with H_O and a function for progress."""
        nbytes = self.source.parameters[name].nbytes // number
        moment = self.moments.read(name)
        for i, calibration in enumerate(calibrations):
            if calibration is None:
                yield None
                continue
            H_O = None if moment is None else moment.to(self.device)
            tell = partial(self._tell_within, i, nbytes)
            yield replace(calibration, output_hessian=H_O, progress=tell)

    def received(self, name: str, matrices: Sequence[PackedWeight]) -> PackedMatrices:
        quantizer = self.layout.packed[name].quantizer
        self._count(name)
        return PackedMatrices(name, quantizer, [matrix.to(self.device) for matrix in matrices])

    def read(self, name: str) -> PackedMatrices:
        entry = self.layout.packed[name]
        layout, packed = entry.site.layout, []
        for prefix in entry.site.prefixes(name):
            tensors = {key: self.writer.read(f"{prefix}.{key}") for key in layout.tensors}
            packed.append(layout.fill(tensors).to(self.device))
        self._count(name)
        return PackedMatrices(name, entry.quantizer, packed)

    def read_dense(self, name: str) -> Tensor:
        return self.writer.read(name)

    def write(self, packed: PackedMatrices) -> None:
        if not self.is_written(packed.name):
            prefixes = self.layout.packed[packed.name].site.prefixes(packed.name)
            tensors = {
                f"{prefix}.{key}": value.cpu()
                for prefix, each in zip(prefixes, packed.matrices, strict=True)
                for key, value in each.tensors.items()
            }
            self.writer.write(packed.name, tensors)

    def _count(self, name: str) -> None:
        self.done_bytes += self.source.parameters[name].nbytes
        self.tell("packing")

    def _tell_within(self, number: int, nbytes: int, share: float) -> None:
        """Show the finished share of a parameter's matrix ``number``; each has ``nbytes``."""
        self.tell("packing", int((number + share) * nbytes))

    def tell(self, phase: str, more_bytes: int = 0) -> None:
        self.progress(phase, self.done_bytes + more_bytes, self._total)
