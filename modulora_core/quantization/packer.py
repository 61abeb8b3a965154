"""Parameters on their way from a model into the files of a packed checkpoint."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from modulora_core.calibration import BlockWalk, Tuner
from modulora_core.checkpoints.record import PackedSite
from modulora_core.checkpoints.shards import ShardWriter
from modulora_core.errors import WorkError, note_plugin
from modulora_core.packed import ChannelScales
from modulora_core.models import ModelSource
from modulora_core.models.progress import Progress
from modulora_core.quantization.layout import Plan
from modulora_core.spec import Calibration, PackedWeight


@dataclass(frozen=True, slots=True)
class Packed:
    """What packing a model told.

    Attributes:
        unreached: the experts that no calibration token was routed to.
        tuning_errors: of each block that was tuned in this run, the error on samples held out, before and after
            (:func:`modulora_core.calibration.tuning.relative_error`).
    """

    unreached: Sequence[str] = ()
    tuning_errors: Mapping[str, tuple[float, float]] = field(default_factory=dict)


def pack_all(
    source: ModelSource,
    plan: Plan,
    writer: ShardWriter,
    device: torch.device,
    progress: Progress | None,
) -> Packed:
    """Write every parameter of ``source``: one at a time, or, with calibration, one decoder block at a time.

    What ``writer`` has already isn't packed again; with tuning this holds for whole blocks only.

    Raises:
        ModelError: the model can't be run block by block.
        WorkError: a layer's inputs on the calibration text aren't finite, or a quantizer broke its layout's word.
    """
    packer = _Packer(plan, writer, device, progress, source)
    if plan.calibration is None:
        for name, tensor in source.tensors():
            packer.take(name, tensor)
        return Packed()
    walk = BlockWalk(source, plan.calibration, plan.linears, device=device, folder=writer.folder)
    tuner = None
    if plan.calibration.config.tuning is not None:
        packer = _BlockPacker(plan, writer, device, progress, source, blocks=walk.blocks)
        tuner = Tuner(plan.calibration, packer, seed=plan.record.seed)
    in_blocks = tuple(f"{path}." for path in walk.blocks)
    outside = {name for name in source.parameters if not name.startswith(in_blocks)}
    for name, tensor in source.tensors(names=outside):
        packer.take(name, tensor)
    walk.run(packer, tuner)
    return Packed(walk.unreached, {} if tuner is None else tuner.errors)


class _Packer:
    """Packs parameters and writes them; the :class:`~modulora_core.calibration.walk.Packing` of a walk."""

    def __init__(
        self,
        plan: Plan,
        writer: ShardWriter,
        device: torch.device,
        progress: Progress | None,
        source: ModelSource,
    ) -> None:
        self._plan, self._writer, self._device, self._progress = plan, writer, device, progress
        self._sizes = {name: info.nbytes for name, info in source.parameters.items()}
        self._total, self._done = sum(self._sizes.values()), 0

    def take(self, name: str, tensor: Tensor) -> None:
        """A parameter that needs no calibration, as the model stores it: packed or kept, as planned."""
        site = self._site(name)
        if name in self._writer.done:
            self._tell(name)
        elif site is None:
            self._write(name, {name: tensor})
        else:
            packed = self._pack(name, site, _matrices(tensor, site), [None] * (site.experts or 1))
            self._write(name, _stored(name, site, packed))

    def keep(self, name: str, tensor: Tensor) -> None:
        if name in self._writer.done:
            self._tell(name)
        else:
            self._write(name, {name: tensor})

    def wants_calibration(self, name: str) -> bool:
        site = self._site(name)
        return site is not None and self._plan.quantizer(site).spec.calibration != "none"

    def is_packed(self, name: str) -> bool:
        return name in self._writer.done

    def restore(self, name: str) -> Iterator[Tensor]:
        site = self._site(name)
        assert site is not None
        for prefix in site.prefixes(name):
            tensors = {key: self._writer.read(f"{prefix}.{key}") for key in site.layout.tensors}
            yield self._values(site, site.layout.fill(tensors).to(self._device))
        self._tell(name)

    def pack(
        self, name: str, matrices: Sequence[Tensor], calibrations: Iterable[Calibration | None]
    ) -> Iterator[Tensor]:
        site = self._site(name)
        assert site is not None
        packed = self._pack(name, site, matrices, calibrations)
        self._write(name, _stored(name, site, packed))
        return (self._values(site, each) for each in packed)

    def _site(self, name: str) -> PackedSite | None:
        index = self._plan.record.weights.get(name)
        return None if index is None else self._plan.record.sites[index]

    def _values(self, site: PackedSite, packed: PackedWeight) -> Tensor:
        return self._plan.quantizer(site).dequantize_tile(
            packed, (0, packed.shape[0]), torch.float32
        )

    def _pack(
        self,
        name: str,
        site: PackedSite,
        matrices: Iterable[Tensor],
        calibrations: Iterable[Calibration | None],
    ) -> list[PackedWeight]:
        quantizer = self._plan.quantizer(site)
        packed: list[PackedWeight] = []
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            # a stream of its own for each parameter, so that a resumed run draws the same numbers
            torch.manual_seed(zlib.crc32(f"{self._plan.record.seed} {name}".encode()))
            for matrix, seen in zip(matrices, calibrations, strict=True):
                try:
                    packed.append(quantizer.pack(matrix.to(self._device), seen))
                except Exception as error:  # whatever a plugin raises
                    note_plugin(error, quantizer.spec.name, f"packing {name}, {list(matrix.shape)}")
                    raise
                self._check(name, site, packed[-1], "packed")
        return packed

    def _check(self, name: str, site: PackedSite, packed: PackedWeight, what: str) -> None:
        if packed.layout != site.layout:
            raise WorkError(f"{name}: {packed.quantizer} {what} it as {packed.layout}, but its layout() "
                            f"promised {site.layout}; report it to the plugin's author")  # fmt: skip

    def _write(self, name: str, stored: Mapping[str, Tensor]) -> None:
        self._writer.write(name, stored)
        self._tell(name)

    def _tell(self, name: str) -> None:
        self._done += self._sizes[name]
        self._show("packing", self._done)

    def _show(self, what: str, done: int) -> None:
        if self._progress is not None:
            self._progress(what, done, self._total)


class _BlockPacker(_Packer):
    """Holds the parameters of a block back until it is tuned: also the
    :class:`~modulora_core.calibration.tuning.HeldBack` of a tuner.

    A block's parameters count twice in the progress: when they are packed, and when the block is tuned.
    """

    def __init__(
        self,
        plan: Plan,
        writer: ShardWriter,
        device: torch.device,
        progress: Progress | None,
        source: ModelSource,
        *,
        blocks: Sequence[str],
    ) -> None:
        super().__init__(plan, writer, device, progress, source)
        self._block_of: dict[str, str] = {}
        parameters = {path: [n for n in self._sizes if n.startswith(f"{path}.")] for path in blocks}
        for path, names in parameters.items():
            self._block_of |= dict.fromkeys(names, path)
        # as it was before this run: a block of which a part is written is packed and tuned again
        self._whole = {path for path, names in parameters.items() if writer.done.issuperset(names)}
        self._total += sum(self._sizes[name] for name in self._block_of)
        self._kept: dict[str, Tensor] = {}
        self._packed: dict[str, list[PackedWeight]] = {}
        self._rescaled: dict[str, list[PackedWeight]] = {}

    def keep(self, name: str, tensor: Tensor) -> None:
        if self._block_of[name] in self._whole:
            self._tell_twice(name)
            return
        if name not in self._kept:
            self._tell(name)
        self._kept[name] = tensor

    def is_packed(self, name: str) -> bool:
        return self.is_whole(self._block_of[name])

    def restore(self, name: str) -> Iterator[Tensor]:
        yield from super().restore(name)
        self._tell(name)

    def pack(
        self, name: str, matrices: Sequence[Tensor], calibrations: Iterable[Calibration | None]
    ) -> Iterator[Tensor]:
        site = self._site(name)
        assert site is not None
        self._packed[name] = self._pack(name, site, matrices, calibrations)
        self._tell(name)
        return (self._values(site, each) for each in self._packed[name])

    def is_whole(self, path: str) -> bool:
        return path in self._whole

    def restore_vector(self, name: str) -> Tensor:
        return self._writer.read(name)

    def rescales(self, name: str) -> bool:
        site = self._site(name)
        return site is not None and self._plan.quantizer(site).spec.rescales

    def rescale(self, name: str, scales: ChannelScales | None) -> Iterator[Tensor]:
        site = self._site(name)
        assert site is not None
        self._rescaled.pop(name, None)
        if scales is not None:
            [packed] = self._packed[name]
            quantizer = self._plan.quantizer(site)
            self._rescaled[name] = [quantizer.rescaled(packed, scales.input, scales.output)]
            self._check(name, site, self._rescaled[name][0], "rescaled")
        return (self._values(site, each) for each in self._rescaled.get(name, self._packed[name]))

    def tell_tuning(self, step: int, steps: int) -> None:
        self._show("tuning", self._done + self._held_bytes() * step // steps)

    def release(self) -> None:
        for name, tensor in self._kept.items():
            self._writer.write(name, {name: tensor})
        for name, packed in (self._packed | self._rescaled).items():
            site = self._site(name)
            assert site is not None
            self._writer.write(name, _stored(name, site, packed))
        self._done += self._held_bytes()
        self._show("tuning", self._done)
        for held in (self._kept, self._packed, self._rescaled):
            held.clear()

    def _held_bytes(self) -> int:
        return sum(self._sizes[name] for name in (*self._kept, *self._packed))

    def _tell_twice(self, name: str) -> None:
        self._tell(name)
        self._tell(name)


def _stored(name: str, site: PackedSite, packed: Sequence[PackedWeight]) -> dict[str, Tensor]:
    """The tensors of a packed parameter by the names that they have in the files."""
    return {
        f"{prefix}.{key}": value.cpu()
        for prefix, each in zip(site.prefixes(name), packed, strict=True)
        for key, value in each.tensors.items()
    }


def _matrices(tensor: Tensor, site: PackedSite) -> Iterator[Tensor]:
    """The ``[out, in]`` matrices of a parameter as the model stores it."""
    for matrix in [tensor] if site.experts is None else tensor:
        yield matrix.t() if site.transposed else matrix
