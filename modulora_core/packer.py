"""Parameters on their way from a model into the files of a packed checkpoint."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor

from modulora_core.calibration import BlockWalk
from modulora_core.errors import WorkError
from modulora_core.quantization_plan import Plan
from modulora_core.record import PackedSite
from modulora_core.shards import ShardWriter
from modulora_core.sources import ModelSource
from modulora_core.spec import Calibration, PackedWeight

Progress = Callable[[str, int, int], None]
"""``progress(what, done, total)`` in bytes of the source."""


def pack_all(
    source: ModelSource, plan: Plan, writer: ShardWriter, device: torch.device, progress: Progress | None
) -> list[str]:
    """Write every parameter of ``source``: one at a time, or, with calibration, one decoder block at a time.

    What ``writer`` has already isn't packed again.

    Returns:
        the experts that no calibration token reached.

    Raises:
        ModelError: the model can't be run block by block.
        WorkError: a layer's inputs on the calibration text aren't finite, or a quantizer broke its layout's word.
    """
    packer = _Packer(plan, writer, device, progress, source)
    if plan.calibration is None:
        for name, tensor in source.tensors():
            packer.take(name, tensor)
        return []
    walk = BlockWalk(source, plan.calibration, plan.linears, device=device, folder=writer.folder)
    in_blocks = tuple(f"{path}." for path in walk.blocks)
    outside = {name for name in source.parameters if not name.startswith(in_blocks)}
    for name, tensor in source.tensors(names=outside):
        packer.take(name, tensor)
    walk.run(packer)
    return walk.unreached


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
        if site is None:
            self.keep(name, tensor)
        elif name in self._writer.done:
            self._tell(name)
        else:
            self._write(name, site, _matrices(tensor, site), [None] * (site.experts or 1))

    def keep(self, name: str, tensor: Tensor) -> None:
        if name not in self._writer.done:
            self._writer.write(name, {name: tensor})
        self._tell(name)

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
        packed = self._write(name, site, matrices, calibrations)
        return (self._values(site, each) for each in packed)

    def _site(self, name: str) -> PackedSite | None:
        index = self._plan.record.weights.get(name)
        return None if index is None else self._plan.record.sites[index]

    def _values(self, site: PackedSite, packed: PackedWeight) -> Tensor:
        return self._plan.quantizer(site).dequantize_tile(packed, (0, packed.shape[0]), torch.float32)

    def _write(
        self,
        name: str,
        site: PackedSite,
        matrices: Iterable[Tensor],
        calibrations: Iterable[Calibration | None],
    ) -> list[PackedWeight]:
        quantizer = self._plan.quantizer(site)
        stored: dict[str, Tensor] = {}
        packed: list[PackedWeight] = []
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            # a stream of its own for each parameter, so that a resumed run draws the same numbers
            torch.manual_seed(zlib.crc32(f"{self._plan.record.seed} {name}".encode()))
            for prefix, matrix, seen in zip(site.prefixes(name), matrices, calibrations, strict=True):
                packed.append(quantizer.pack(matrix.to(self._device), seen))
                if packed[-1].layout != site.layout:
                    raise WorkError(f"{name}: {quantizer.spec.name} packed it as {packed[-1].layout}, but its layout() "
                                    f"promised {site.layout}; report it to the plugin's author")  # fmt: skip
                stored |= {f"{prefix}.{key}": value.cpu() for key, value in packed[-1].tensors.items()}
        self._writer.write(name, stored)
        self._tell(name)
        return packed

    def _tell(self, name: str) -> None:
        self._done += self._sizes[name]
        if self._progress is not None:
            self._progress("packing", self._done, self._total)


def _matrices(tensor: Tensor, site: PackedSite) -> Iterator[Tensor]:
    """The ``[out, in]`` matrices of a parameter as the model stores it."""
    for matrix in [tensor] if site.experts is None else tensor:
        yield matrix.t() if site.transposed else matrix
