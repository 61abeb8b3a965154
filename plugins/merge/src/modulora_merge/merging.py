"""Merges an adapter into the packed weights of its model: codes move, scales and sizes stay.

An adapter changes most weights by less than half a step of their grid, so rounding each weight for
itself undoes the change. Here rounding has feedback (:mod:`modulora_kernels.feedback`): it moves
the few weights that together give the layer's outputs on a text.

Decoder blocks follow each other. A block's H comes from the outputs of the merged blocks before it.
"""

from __future__ import annotations

import logging
import math
import os
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from modulora_evaluate.divergence import Divergence, divergence
from modulora_kernels.feedback import merges, rounded_to_grid
from torch import Tensor

from modulora_core.arguments import checked
from modulora_core.calibration import (
    BlockVisitor,
    BlockWalk,
    CalibrationConfig,
    CalibrationText,
    PackedMatrices,
    block_prefixes,
)
from modulora_core.checkpoints.opening import open_packed
from modulora_core.checkpoints.packed_checkpoint import PackedCheckpoint
from modulora_core.checkpoints.record import PackedSite
from modulora_core.data import Source, token_segments
from modulora_core.dense_products import product
from modulora_core.distributed import pick_device, world_size
from modulora_core.errors import AdapterError, DataError, OptionError
from modulora_core.hf.load_adapter import adapter_for
from modulora_core.hf.merge import delta_of
from modulora_core.hf.peft_format import AdapterDelta
from modulora_core.inference.opened import open_to_run
from modulora_core.models import ModelSource
from modulora_core.models.locate import locate
from modulora_core.models.sites import LinearSite, find_sites
from modulora_core.models.system_errors import usable_path
from modulora_core.progress import Display, Progress, shown
from modulora_core.spec import Calibration, PackedWeight, Quantizer
from modulora_core.version import VERSION
from modulora_merge.adapted import adapted_source
from modulora_merge.copying import Copy, copy_of
from modulora_merge.unfinished import (
    Unfinished,
    digest_of,
    digest_of_deltas,
    files_of,
    unfinished,
)

SAMPLES, SEQ_LEN, HELD_BACK = 16, 512, 8
"""Segments of the text that H comes from, their tokens, and the segments that judge the result."""

DAMPING = 0.01
"""Added to H's diagonal, as a share of its mean."""

SWEEPS = 1
"""Of coordinate descent, after the rounding with feedback."""

GAIN = 1.5
"""The factor on the adapter's change before rounding: a coarse grid keeps a part of it."""

OVERSHOT = 1.4
"""A layer is rounded again with a smaller gain if it has more of the change than this."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class PackedMerge:
    """A packed model with its adapter merged in.

    Attributes:
        adapted: the parameters that the adapter changes; weights: their weights; changed: the
            weights with another value than before.
        found: the model before, with its adapter beside, and merged, on the held-back text.
    """

    out: str
    adapted: int
    weights: int
    changed: int
    seconds: float
    found: Divergence | None

    @property
    def kept(self) -> float | None:
        """The share of the adapter's effect: (ln base − ln merged) / (ln base − ln beside)."""
        if self.found is None:
            return None
        base, beside, merged = map(math.log, (
            self.found.perplexity_of_base, self.found.perplexity_before, self.found.perplexity,
        ))  # fmt: skip
        return (base - merged) / (base - beside) if base != beside else None

    def to_json(self) -> dict[str, Any]:
        facts = {key: value for key, value in asdict(self).items() if key != "found"}
        if self.found is None:
            return facts
        return facts | {
            "perplexity_of_base": self.found.perplexity_of_base,
            "perplexity_beside": self.found.perplexity_before,
            "perplexity_merged": self.found.perplexity,
            "kl_to_beside": self.found.kl_divergence,
            "effect_kept": self.kept,
        }


@checked
def merge_packed(
    model: str | Path,
    out: str | Path,
    *,
    adapter: str | Path,
    calibration: Source,
    samples: int = SAMPLES,
    seq_len: int = SEQ_LEN,
    held_back: int = HELD_BACK,
    damping: float = DAMPING,
    sweeps: int = SWEEPS,
    gain: float = GAIN,
    seed: int = 0,
    resume: bool = False,
    progress: Display = True,
) -> PackedMerge:
    """Write ``model`` with ``adapter`` merged into its packed weights: format, types, sizes stay.

    One decoder block is dense at a time. The packed model is loaded once more to judge the result.

    Args:
        model: a packed model: a folder, a file, or a Hub id.
        out: the folder or the file to write.
        adapter: a LoRA adapter in PEFT's format, a folder or Hub id.
        calibration: the text: files, a Hub dataset, or ``pydoc``.
        samples: segments of the text that H comes from; held_back: further segments for the
            comparison, 0 compares nothing.
        seq_len: tokens of a segment.
        damping: added to H's diagonal, as a share of its mean.
        sweeps: of coordinate descent, after the rounding with feedback.
        gain: multiplies the adapter's change before rounding. Layers whose grid is fine enough to
            keep the larger change get a smaller one.
        seed: for the choice of segments.
        resume: continue an interrupted call with the same arguments. ``OUT.merging`` has the
            parameters that it merged.
        progress: called with a phase, the finished count and the total; by default a bar on a
            terminal, and False shows none.

    Raises:
        OptionError: a packed weight has no grid to move on, or a run of several processes.
        AdapterError: it does not fit the model, or changes a layer outside of the blocks.
        DataError: the text is too short.
        RequestError: the model can't be read, its format is only read, ``out`` holds something, or
            without ``resume`` there is an interrupted call.
        WorkError: an input of a layer is NaN or Inf.
    """
    started, model = time.perf_counter(), os.fspath(model)
    out = usable_path(out, "output", OptionError)
    if world_size() > 1:
        raise OptionError(f"merge-packed: expected one process, got {world_size()}")
    location = locate(model)
    checkpoint = open_packed(location)
    checkpoint.check_whole()
    deltas = adapter_for(checkpoint, adapter).deltas
    source = adapted_source(location, checkpoint, deltas)
    linears = _adapted(checkpoint, source, deltas)
    ids = token_segments(
        calibration, checkpoint.tokenizer(), seq_len, samples + held_back, seed=seed
    )
    if len(ids) < 1 + held_back:
        raise DataError(
            f"calibration: expected text for {held_back} held-back segments of {seq_len} tokens "
            f"and more, got {len(ids)}; give more text, or a smaller --seq-len or --held-back"
        )
    held, ids = ids[:held_back], ids[held_back:]
    text = CalibrationText(CalibrationConfig(calibration, seq_len=seq_len), ids)
    request = {
        "model": files_of(checkpoint.path), "adapter": digest_of_deltas(deltas),
        "text": digest_of(ids), "options": [damping, sweeps, gain], "version": VERSION,
    }  # fmt: skip
    with (
        unfinished(out, request, resume=resume) as parts,
        copy_of(checkpoint, out) as copy,
    ):
        with (
            shown(progress, "merging", "layers") as show,
            tempfile.TemporaryDirectory() as folder,
        ):
            merger = _Merger(checkpoint, copy, parts, len(linears), damping, sweeps, gain, show)
            BlockWalk(source, text, linears, merger, pick_device(), Path(folder)).run()
        found = None
        if held_back:
            before = open_to_run(model, adapter=adapter)
            with shown(progress, "comparing", "segments") as show:
                found = divergence(before, open_to_run(str(copy.path)), held, progress=show)
    merged = PackedMerge(
        str(out), len(linears), merger.weights, merger.changed,
        time.perf_counter() - started, found,
    )  # fmt: skip
    if found is not None and found.is_lost:
        logger.warning(
            "%s: its KL divergence to the adapter's predictions, %.3g, is more than half of the "
            "adapter's own effect, %.3g; train longer, give more text, or keep the adapter beside",
            out, found.kl_divergence, found.kl_of_adapter,
        )  # fmt: skip
    return merged


def _adapted(
    checkpoint: PackedCheckpoint, source: ModelSource, deltas: Mapping[str, AdapterDelta]
) -> list[LinearSite]:
    """The parameters that the adapter changes. Raises OptionError, AdapterError: one can't be."""
    inside = block_prefixes(source)
    found = [
        site
        for site in find_sites(source.outline, include=["*"]).linears
        if site.name in checkpoint.parameters and delta_of(checkpoint, site.name, deltas)
    ]
    if len(found) < len(deltas) or not all(site.name.startswith(inside) for site in found):
        raise AdapterError(
            "adapter: expected changes inside of decoder blocks alone, got one of the head or the "
            "embedding; train without it, or merge into a dense model with `modulora merge`"
        )
    for site in found:
        stored = checkpoint.record.site(site.name)
        quantizer = checkpoint.quantizer(stored)
        if not merges(quantizer):
            raise OptionError(
                f"{site.name}: expected a quantizer whose codes can move on a grid, got "
                f"{quantizer.spec.name}; merge into a dense model with `modulora merge`, or keep "
                "the adapter beside the model"
            )
    return found


@dataclass
class _Merger(BlockVisitor):
    """Rounds each adapted parameter to its grid, and writes it into the copy.

    Attributes:
        parts: the parameters that are merged already.
        total: the number of adapted parameters.
        weights, changed: weights seen, and weights with another value than before.
    """

    checkpoint: PackedCheckpoint
    copy: Copy
    parts: Unfinished
    total: int
    damping: float
    sweeps: int
    gain: float
    progress: Progress
    done: int = 0
    weights: int = 0
    changed: int = 0

    def pack(
        self, name: str, matrices: Sequence[Tensor], calibrations: Iterable[Calibration | None]
    ) -> PackedMatrices:
        quantizer, merged = self._quantizer(name), list[PackedWeight]()
        given = zip(self.checkpoint.packed(name), matrices, calibrations, strict=True)
        for before, V, calibration in given:
            assert calibration is not None
            packed = before.to(V.device)
            merged.append(self._merged(quantizer, packed, V.float(), calibration.hessian))
        return PackedMatrices(name, quantizer, merged)

    def _merged(
        self, quantizer: Quantizer, packed: PackedWeight, V: Tensor, H: Tensor
    ) -> PackedWeight:
        """The packed weight with the change D = V − Ŵ, rounded."""
        W, gain = _values(quantizer, packed), self.gain
        DH = product(V - W, H)
        for _ in range(2):
            after = rounded_to_grid(
                quantizer, packed, W.lerp(V, gain), H, damping=self.damping, sweeps=self.sweeps
            )
            made = _values(quantizer, after) - W
            kept = float((made * DH).sum() / ((V - W) * DH).sum())  # NaN without a change
            if not kept > OVERSHOT:
                break
            gain = max(1.0, gain / kept)
        return after

    def is_written(self, name: str) -> bool:
        return self.parts.has(name)

    def read(self, name: str) -> PackedMatrices:
        before = [*self.checkpoint.packed(name)]
        return PackedMatrices(name, self._quantizer(name), self.parts.read(name, before))

    def write(self, packed: PackedMatrices) -> None:
        name, quantizer = packed.name, packed.quantizer
        if not self.is_written(name):
            self.parts.write(name, packed.matrices)
        self.copy.replace(name, packed.matrices)
        for before, after in zip(self.checkpoint.packed(name), packed.matrices, strict=True):
            made, W = _values(quantizer, after), _values(quantizer, before.to(after.device))
            self.weights += W.numel()
            self.changed += int((made != W).count_nonzero())
        self.done += 1
        self.progress("merging", self.done, self.total)

    def _quantizer(self, name: str) -> Quantizer:
        stored = self.checkpoint.parameters[name]
        assert isinstance(stored, PackedSite)
        return self.checkpoint.quantizer(stored)


def _values(quantizer: Quantizer, packed: PackedWeight) -> Tensor:
    return quantizer.dequantize_tile(packed, (0, packed.shape[0]), torch.float32)
