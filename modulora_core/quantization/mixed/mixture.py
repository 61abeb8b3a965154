"""Chooses a quantizer for each layer within a budget: measures every choice, then allocates."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from modulora_core.calibration import CalibrationText, find_blocks
from modulora_core.calibration.states import spilled_bytes
from modulora_core.checkpoints.record import QuantizationRecord
from modulora_core.errors import OptionError
from modulora_core.models import ModelSource
from modulora_core.models.progress import Progress
from modulora_core.quantization.layout import Layout, Selection
from modulora_core.quantization.mixed.allocation import Allocation, Offer, allocate
from modulora_core.quantization.mixed.candidates import Candidates, find_candidates
from modulora_core.quantization.mixed.errors import held_out_ids, measure_errors
from modulora_core.quantization.mixed.recorded import recorded_allocation
from modulora_core.registry import Choice


@dataclass(frozen=True, slots=True)
class Budget:
    """Chooses a quantizer for each layer, so that the sum of their errors is small.

    Attributes:
        nbytes: the size of all tensors of the checkpoint, packed and dense. Headers, config and
            tokenizer do not count.
        choices: the quantizers to choose from, at least two.
    """

    nbytes: int
    choices: Sequence[Choice]


@dataclass
class Mixture:
    """A budget for one model.

    Raises:
        OptionError: the budget is too small.
    """

    source: ModelSource
    candidates: Candidates
    budget: int
    _errors: Mapping[str, Sequence[float]] = field(default_factory=dict, init=False)
    _allocation: Allocation | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        found, smallest = self.candidates, self.candidates.smallest
        if self.budget >= smallest:
            return
        ends = ", ".join(f"{end.site.module} by {end.choice.label}" for end in found.ends)
        raise OptionError(
            f"budget: expected at least {smallest} bytes ({_mib(smallest)}), got {self.budget} "
            f"({_mib(self.budget)}): dense tensors take {_mib(found.kept_bytes)}, "
            f"{f'{ends} {_mib(found.ends_bytes)}, ' if ends else ''}and the smallest choice for "
            f"every layer {_mib(smallest - found.fixed_bytes)}; give more, or smaller choices"
        )

    @property
    def request(self) -> dict[str, Any]:
        """Identifies a run: equal requests give equal checkpoints."""
        return {
            "source": self.source.identity(),
            "seed": self.candidates.seed,
            "weights": [linear.name for linear in self.candidates.linears],
            "kept": dict(self.candidates.kept),
            **self.candidates.to_json(self.budget),
        }

    def nbytes(self, device: torch.device) -> int:
        """The largest size of the files to write: the checkpoint's, and hidden states."""
        text = self.candidates.calibration
        blocks = len(find_blocks(self.source.skeleton()))
        tokens = (blocks + 1) * held_out_ids(text).numel()
        spilled = spilled_bytes(tokens, self.source.config, device, text.config.spill)
        return min(self.budget, self.candidates.largest) + spilled

    def choose(
        self,
        device: torch.device,
        folder: Path,
        max_shard_bytes: int,
        *,
        resume: bool,
        progress: Progress | None,
    ) -> Layout:
        """Measure every layer's errors, and choose its quantizer.

        Raises:
            ModelError, WorkError: as :func:`measure_errors`.
        """
        self._errors = measure_errors(
            self.source, self.candidates, device=device, folder=folder, resume=resume,
            progress=progress,
        )  # fmt: skip
        sizes = self.candidates.sizes
        offers = [list(map(Offer, sizes[name], self._errors[name])) for name in sizes]
        self._allocation = allocate(offers, self.budget - self.candidates.fixed_bytes)
        taken = dict(zip(sizes, self._allocation.taken, strict=True))
        return self.candidates.layout(self.source, taken, self.budget, max_shard_bytes)

    def table(self, record: QuantizationRecord) -> dict[str, Any]:
        """The table that :func:`recorded_allocation` reads, with the user's names and with errors.

        Returns:
            also ``error`` and its lower ``bound``, in nats per token. Each layer has ``error``,
            and ``errors`` under each choice. Each choice has ``error`` of its layers, and
            ``uniform_bytes`` and ``uniform_error`` of a checkpoint with this choice everywhere.
        """
        found, allocation = self.candidates, self._allocation
        table = recorded_allocation(record, found.kept_bytes)
        assert table is not None, "the record is from this run"
        assert allocation is not None, "choose() was called"
        layers = table["layers"]
        for name, layer in layers.items():
            errors = self._errors[name]
            layer |= {"error": errors[layer["choice"]], "errors": list(errors)}
        for index, (choice, row) in enumerate(zip(found.choices, table["choices"], strict=True)):
            own = [layer["error"] for layer in layers.values() if layer["choice"] == index]
            sizes = [sizes[index] for sizes in found.sizes.values()]
            row |= {
                "name": choice.label,
                "error": sum(own),
                "uniform_bytes": found.fixed_bytes + sum(sizes),
                "uniform_error": math.fsum(layer["errors"][index] for layer in layers.values()),
            }
        for end in found.ends:
            table["ends"][end.site.name]["name"] = end.choice.label
        return {**table, "error": allocation.error, "bound": allocation.bound}


def find_mixture(
    source: ModelSource,
    budget: Budget,
    calibration: CalibrationText | None,
    selection: Selection,
    *,
    seed: int,
) -> Mixture:
    """Prepare the choice. Reads no weight.

    Raises:
        OptionError: there is no calibration text, or the budget is too small.
        RequestError: as :func:`~modulora_core.quantization.mixed.candidates.find_candidates`.
    """
    if calibration is None:
        raise OptionError(
            "budget: expected a calibration text that errors are measured on, got none"
        )
    candidates = find_candidates(source, budget.choices, calibration, selection, seed=seed)
    return Mixture(source, candidates, budget.nbytes)


def _mib(nbytes: int) -> str:
    return f"{nbytes / 2**20:,.2f} MiB"
