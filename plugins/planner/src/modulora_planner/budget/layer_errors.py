"""Measures each layer's error under each choice, block by block, and notes it in a journal.

    error = ½ Σᵢ sᵢ · (ΔW H ΔWᵀ)ᵢᵢ         ΔW = Ŵ − W

s is the sensitivity of the loss to a layer's outputs. H is the second moment of its inputs, with
each token weighted by its sensitivity (:mod:`modulora_core.calibration.sensitivity`). Both belong
to the dense model, so each error is due to one layer alone, in nats per token, and errors add up.

Calibrated quantizers reduce the error on their own samples more than on other text, and some do so
more than others. Therefore some samples are held out. Quantizers get the plain H of the other
samples; s and H of the error come from the held-out ones.

Packed candidates are dropped. The checkpoint is packed later, with all samples and with the inputs
that the quantized layers give.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from modulora_core.calibration import BlockVisitor, BlockWalk, CalibrationText, HeldOutCalibration
from modulora_core.calibration.gradients import Sensitivity
from modulora_core.calibration.sensitivity import loss_sensitivities
from modulora_core.checkpoints.packing import pack_matrix, random_stream
from modulora_core.errors import WorkError
from modulora_core.models import ModelSource
from modulora_core.models.json_files import repair_journal
from modulora_core.models.sites import LinearSite
from modulora_core.progress import Progress
from modulora_core.spec import Calibration, PackedWeight, Quantizer, titled
from modulora_core.tiles import tile_bytes, tile_ranges

ERRORS_FILE = "errors.jsonl"
"""The file of a run's folder with a line for each measured layer."""

_HELD_OUT_EVERY = 4
"""Measuring holds one of so many samples out; at least one, at most :data:`_MOST_HELD_OUT`."""

_MOST_HELD_OUT = 16


def held_out_ids(calibration: CalibrationText) -> Tensor:
    """The held-out samples, the last ones: ``[samples, seq_len]``."""
    return calibration.ids[-min(_MOST_HELD_OUT, max(1, len(calibration.ids) // _HELD_OUT_EVERY)) :]


def measure_errors(
    source: ModelSource,
    calibration: CalibrationText,
    linears: Sequence[LinearSite],
    quantizers: Sequence[Quantizer],
    *,
    seed: int,
    device: torch.device,
    folder: Path,
    resume: bool,
    progress: Progress,
) -> dict[str, list[float]]:
    """The error of each of ``linears`` under each of ``quantizers``.

    Args:
        folder: for the journal, and for hidden states in a file.
        resume: whether to continue the journal. The caller checks that the request is equal.

    Raises:
        ModelError: the model can't run block by block.
        WorkError: an input, a gradient or an error is NaN or Inf; the message names the layer.
    """
    journal = folder / ERRORS_FILE
    if not resume:
        journal.unlink(missing_ok=True)
    measured = repair_journal(journal, list[float])
    if all(linear.name in measured for linear in linears):
        return measured
    held_out = held_out_ids(calibration)
    sensitivities = loss_sensitivities(
        source, held_out, linears, device=device, folder=folder, seed=seed,
        spill=calibration.config.spill, progress=progress,
    )  # fmt: skip
    sizes = {linear.name: source.parameters[linear.name].nbytes for linear in linears}
    measuring = _Measuring(quantizers, seed, sensitivities, journal, measured, sizes, progress)
    weights = {name: [each.tokens for each in found] for name, found in sensitivities.items()}
    walk = BlockWalk(
        source, calibration, linears, measuring, device, folder,
        held_out=len(held_out), held_out_weights=weights,
    )  # fmt: skip
    walk.run()
    return measured


@dataclass
class _Measuring(BlockVisitor):
    """Measures every layer, and leaves it dense."""

    quantizers: Sequence[Quantizer]
    seed: int
    sensitivities: Mapping[str, Sequence[Sensitivity]]
    journal: Path
    measured: dict[str, list[float]]
    sizes: Mapping[str, int]
    progress: Progress

    def is_written(self, name: str) -> bool:
        return name in self.measured

    def pack(
        self, name: str, matrices: Sequence[Tensor], calibrations: Iterable[Calibration | None]
    ) -> None:
        totals = [0.0] * len(self.quantizers)
        of_matrices = zip(matrices, calibrations, self.sensitivities[name], strict=True)
        for weight, seen, sensitivity in of_matrices:
            assert isinstance(seen, HeldOutCalibration)
            H, s = seen.held_out.hessian, sensitivity.outputs
            for i, quantizer in enumerate(self.quantizers):
                with random_stream(self.seed, name):
                    given = seen if quantizer.wants_calibration else None
                    packed = pack_matrix(name, quantizer, weight, given)
                totals[i] += weighted_error(weight, quantizer, packed, H, s)
        for quantizer, total in zip(self.quantizers, totals, strict=True):
            if not math.isfinite(total):
                raise WorkError(
                    f"{name}: expected a finite error under {quantizer.spec.name} "
                    f"({titled(quantizer.options.model_dump())}), got {total}; leave this choice "
                    "out"
                )
        with self.journal.open("a") as journal:
            journal.write(json.dumps([name, totals]) + "\n")
        self.measured[name] = totals
        done = sum(self.sizes[each] for each in self.measured)
        self.progress("measuring", done, sum(self.sizes.values()))


def weighted_error(
    weight: Tensor, quantizer: Quantizer, packed: PackedWeight, H: Tensor, s: Tensor
) -> float:
    """½ Σᵢ sᵢ (ΔW H ΔWᵀ)ᵢᵢ, a tile of rows at a time.

    Args:
        weight: W, ``[out, in]``; packed: Ŵ; H: ``[in, in]``, fp32; s: ``[out]``.
    """
    out_features, in_features = weight.shape
    total = 0.0
    for start, stop in tile_ranges(out_features, 4 * in_features, tile_bytes(weight.device)):
        tile = quantizer.dequantize_tile(packed, (start, stop), torch.float32)
        difference = tile - weight[start:stop].float()
        rows = ((difference @ H) * difference).sum(1, dtype=torch.float64)  # [stop - start]
        total += float((rows.clamp_min(0) * s[start:stop].to(rows)).sum())
    return total / 2
