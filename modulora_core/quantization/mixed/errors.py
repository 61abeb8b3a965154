"""Each layer's error under each choice, measured block by block and noted in a journal.

    error = ½ Σᵢ sᵢ · (ΔW H ΔWᵀ)ᵢᵢ         ΔW = Ŵ − W

s says how much the loss minds an error in an output, and H, the second moment of the layer's inputs, counts each token as much as the loss
minds errors there (:mod:`modulora_core.calibration.sensitivity`). Both are of the unquantized model: so each error is one layer's alone, in
nats per token, and errors of layers may be added up.

Calibrated quantizers make the error small on the samples that they are given, and smaller there than on other text; some more than
others. So some samples are held out: quantizers are given the plain H of the others, s and H of the error are of these.

Packed candidates are dropped: what is written later is packed with all samples, on the inputs that the quantized layers before
it give, and would differ.
"""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from modulora_core.calibration import BlockWalk, CalibrationText, HeldOutCalibration
from modulora_core.calibration.sensitivity import Sensitivity, loss_sensitivities
from modulora_core.errors import WorkError
from modulora_core.models import ModelSource
from modulora_core.models.progress import Progress
from modulora_core.quantization.mixed.candidates import Candidates
from modulora_core.spec import Calibration, PackedWeight, Quantizer
from modulora_core.tiles import tile_bytes, tile_ranges

JOURNAL = "errors.jsonl"
"""In an unfinished folder: a line for each layer that is measured."""


HELD_OUT = 4
"""One calibration sample of so many is held out to judge by; at least one, at most :data:`MOST_HELD_OUT`."""

MOST_HELD_OUT = 16


def judging(calibration: CalibrationText) -> Tensor:
    """The samples that are held out, ``[samples, seq_len]``: the last ones."""
    return calibration.ids[-min(MOST_HELD_OUT, max(1, len(calibration.ids) // HELD_OUT)) :]


def measure_errors(
    source: ModelSource,
    candidates: Candidates,
    *,
    device: torch.device,
    folder: Path,
    resume: bool,
    progress: Progress | None,
) -> dict[str, list[float]]:
    """The error of every layer under every choice, in the order of the choices.

    Args:
        folder: for the journal, and for hidden states where they are large.
        resume: take what the journal has; the caller knows that it is of the same request.

    Raises:
        ModelError: the model can't be run block by block.
        WorkError: inputs, gradients or errors aren't finite; the message names the layer.
    """
    journal = folder / JOURNAL
    if not resume:
        journal.unlink(missing_ok=True)
    measured = _read(journal)
    if all(linear.name in measured for linear in candidates.linears):
        return measured

    nbytes = sum(source.parameters[linear.name].nbytes for linear in candidates.linears)

    def tell(done: int, total: int) -> None:
        if progress is not None:
            progress("weighing", nbytes * done // total, nbytes)

    text = candidates.calibration
    sensitivities = loss_sensitivities(
        source, judging(text), candidates.linears, device=device, folder=folder, seed=candidates.seed, spill=text.config.spill,
        progress=tell,
    )  # fmt: skip
    held_out = {
        name: [matrix.tokens for matrix in matrices] for name, matrices in sensitivities.items()
    }
    walk = BlockWalk(
        source, text, candidates.linears, device=device, folder=folder, held_out=held_out
    )  # fmt: skip
    walk.run(_Measuring(source, candidates, sensitivities, journal, measured, progress))
    return measured


def _read(journal: Path) -> dict[str, list[float]]:
    """What the journal has; a line that a kill cut off is taken away, and its layer measured again."""
    if not journal.is_file():
        return {}
    whole = [line for line in journal.read_text().splitlines(keepends=True) if line.endswith("\n")]
    journal.write_text("".join(whole))
    entries = [json.loads(line) for line in whole]
    return {str(name): [float(error) for error in errors] for name, errors in entries}


class _Measuring:
    """The :class:`~modulora_core.calibration.walk.Packing` of a walk whose weights stay as they are."""

    def __init__(
        self,
        source: ModelSource,
        candidates: Candidates,
        sensitivities: Mapping[str, Sequence[Sensitivity]],
        journal: Path,
        measured: dict[str, list[float]],
        progress: Progress | None,
    ) -> None:
        self._candidates, self._sensitivities = candidates, sensitivities
        self._journal, self._measured, self._progress = journal, measured, progress
        self._sizes = {
            linear.name: source.parameters[linear.name].nbytes for linear in candidates.linears
        }

    def keep(self, name: str, tensor: Tensor) -> None:
        pass

    def wants_calibration(self, name: str) -> bool:  # noqa: ARG002  # errors are weighted with H in any case
        return True

    def is_packed(self, name: str) -> bool:
        return name in self._measured

    def restore(self, name: str) -> None:
        pass

    def pack(
        self, name: str, matrices: Sequence[Tensor], calibrations: Iterable[Calibration | None]
    ) -> None:
        totals = [0.0] * len(self._candidates.choices)
        for matrix, seen, sensitivity in zip(
            matrices, calibrations, self._sensitivities[name], strict=True
        ):
            assert isinstance(seen, HeldOutCalibration)
            for i, quantizer in enumerate(self._candidates.quantizers):
                totals[i] += self._error(name, quantizer, matrix, seen, sensitivity)
        for choice, total in zip(self._candidates.choices, totals, strict=True):
            if not math.isfinite(total):
                raise WorkError(
                    f"{name}: expected a finite error under {choice.label}, got {total}; leave this choice out"
                )
        with self._journal.open("a") as journal:
            journal.write(json.dumps([name, totals]) + "\n")
        self._measured[name] = totals
        if self._progress is not None:
            done = sum(self._sizes[each] for each in self._measured)
            self._progress("measuring", done, sum(self._sizes.values()))

    def _error(
        self,
        name: str,
        quantizer: Quantizer,
        weight: Tensor,
        seen: HeldOutCalibration,
        sensitivity: Sensitivity,
    ) -> float:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(zlib.crc32(f"{self._candidates.seed} {name}".encode()))
            packed = quantizer.pack(weight, None if quantizer.spec.calibration == "none" else seen)
        return weighted_error(weight, quantizer, packed, seen.held_out.hessian, sensitivity.outputs)


def weighted_error(
    weight: Tensor, quantizer: Quantizer, packed: PackedWeight, hessian: Tensor, sensitivity: Tensor
) -> float:
    """½ Σᵢ sᵢ (ΔW H ΔWᵀ)ᵢᵢ, a tile of rows at a time.

    Args:
        weight: W, ``[out, in]``; packed: Ŵ.
        hessian: H, ``[in, in]``, fp32.
        sensitivity: s, ``[out]``.
    """
    out_features, in_features = weight.shape
    total = 0.0
    for start, stop in tile_ranges(out_features, 4 * in_features, tile_bytes(weight.device)):
        difference = (
            quantizer.dequantize_tile(packed, (start, stop), torch.float32)
            - weight[start:stop].float()
        )
        rows = ((difference @ hessian) * difference).sum(1, dtype=torch.float64)  # [stop - start]
        total += float((rows.clamp_min(0) * sensitivity[start:stop].to(rows)).sum())
    return total / 2
