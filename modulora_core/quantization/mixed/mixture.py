"""Chooses a quantizer for each layer within a budget: measures every choice, then allocates."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from modulora_core.calibration import CalibrationText
from modulora_core.checkpoints.record import QuantizationRecord, Recipe, packed_sites
from modulora_core.errors import DataError, OptionError
from modulora_core.models import ModelSource
from modulora_core.models.ends import End
from modulora_core.models.sites import LinearSite
from modulora_core.progress import Progress
from modulora_core.quantization.layout import (
    Layout,
    Selection,
    check_rescales,
    layout_with,
    linears_outside_blocks,
    with_ends,
)
from modulora_core.quantization.mixed.allocation import Allocation, Offer, allocate
from modulora_core.quantization.mixed.errors import held_out_ids, measure_errors
from modulora_core.quantization.mixed.recorded import recorded_allocation
from modulora_core.registry import Choice
from modulora_core.spec import Quantizer

OUTSIDE = "outside of the decoder blocks, where no error is measured"


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


@dataclass(frozen=True)
class Mixture:
    """The choice of a budget for one model.

    Attributes:
        quantizers: one for each of the budget's choices.
        linears: the layers to choose for, all of them in decoder blocks.
        sizes: by layer, its packed bytes under each choice.
        ends: the packed head and embedding; ends_bytes: their packed size.
        dense: name → reason of every other parameter; dense_bytes: their size.
        calibration: the samples; seed: the seed for random numbers of quantizers.
    """

    source: ModelSource
    budget: Budget
    quantizers: Sequence[Quantizer]
    linears: Sequence[LinearSite]
    sizes: Mapping[str, Sequence[int]]
    ends: Sequence[End]
    ends_bytes: int
    dense: Mapping[str, str]
    dense_bytes: int
    calibration: CalibrationText
    seed: int

    def candidates(self, name: str) -> Sequence[Quantizer]:  # noqa: ARG002 - as of a Layout
        """The quantizers that may pack a layer."""
        return self.quantizers

    @property
    def fixed_bytes(self) -> int:
        """The size of everything that is not chosen for."""
        return self.dense_bytes + self.ends_bytes

    @property
    def nbytes(self) -> int:
        """The largest size that the checkpoint may get."""
        largest = self.fixed_bytes + sum(map(max, self.sizes.values()))
        return min(self.budget.nbytes, largest)

    @property
    def measured_tokens(self) -> int:
        """The number of calibration tokens on which errors are measured."""
        return held_out_ids(self.calibration).numel()

    @property
    def request(self) -> dict[str, Any]:
        """Identifies a run: equal requests give equal checkpoints."""
        return {
            "source": self.source.identity(),
            "seed": self.seed,
            "weights": [linear.name for linear in self.linears],
            "kept": dict(self.dense),
            **self._entry(),
        }

    def made(self, record: QuantizationRecord) -> bool:
        """As :meth:`Layout.made`."""
        packed = {*self.sizes, *(end.site.name for end in self.ends)}
        return (record.source, record.seed, record.allocation, {*record.weights}) == (
            self.source.identity(), self.seed, self._entry(), packed
        )  # fmt: skip

    def _entry(self) -> dict[str, Any]:
        """The entry in the checkpoint's record."""
        recipes = [Recipe.of(quantizer).model_dump(mode="json") for quantizer in self.quantizers]
        of_ends = {end.site.name: Recipe.of(end.choice.create()) for end in self.ends}
        ends = {name: recipe.model_dump(mode="json") for name, recipe in of_ends.items()}
        return {
            "budget": self.budget.nbytes,
            "choices": recipes,
            "measured_on": self.calibration.to_json(),
            **({"ends": ends} if ends else {}),
        }

    def choose(
        self, device: torch.device, folder: Path, *, resume: bool, progress: Progress
    ) -> Layout:
        """Measure every layer's errors (:func:`measure_errors`), and choose its quantizer.

        Returns:
            a layout with :meth:`table`.
        """
        errors = measure_errors(
            self.source, self.calibration, self.linears, self.quantizers,
            seed=self.seed, device=device, folder=folder, resume=resume, progress=progress,
        )  # fmt: skip
        offers = [list(map(Offer, sizes, errors[name])) for name, sizes in self.sizes.items()]
        allocation = allocate(offers, self.budget.nbytes - self.fixed_bytes)
        used = sorted(set(allocation.taken))  # no other quantizer is recorded
        quantizers = [self.quantizers[choice] for choice in used]
        uses_text = any(quantizer.wants_calibration for quantizer in quantizers)
        uses_text |= self.calibration.config.tuning is not None
        chosen = dict(zip(self.sizes, map(used.index, allocation.taken), strict=True))
        quantizers, of_ends = with_ends(quantizers, self.ends)
        chosen |= of_ends
        linears = [*self.linears, *(end.site for end in self.ends)]
        layout = layout_with(
            self.source, quantizers, linears, chosen, self.dense, seed=self.seed,
            calibration=self.calibration if uses_text else None, allocation=self._entry(),
        )  # fmt: skip
        return replace(layout, table=self.table(layout.record, errors, allocation))

    def table(
        self,
        record: QuantizationRecord,
        errors: Mapping[str, Sequence[float]],
        allocation: Allocation,
    ) -> dict[str, Any]:
        """The table of :func:`recorded_allocation`, with the names of the choices and errors.

        Returns:
            also ``error`` and its lower ``bound``, in nats per token. Each layer has ``error``,
            and ``errors`` under each choice. Each choice has ``error`` of its layers, and
            ``uniform_bytes`` and ``uniform_error`` of a checkpoint with this choice everywhere.
        """
        table = recorded_allocation(record, self.dense_bytes)
        assert table is not None, "the record is from this run"
        layers = table["layers"]
        for name, layer in layers.items():
            layer |= {"error": errors[name][layer["choice"]], "errors": list(errors[name])}
        for index, row in enumerate(table["choices"]):
            own = [layer["error"] for layer in layers.values() if layer["choice"] == index]
            row |= {
                "name": self.budget.choices[index].label,
                "error": sum(own),
                "uniform_bytes": self.fixed_bytes + sum(s[index] for s in self.sizes.values()),
                "uniform_error": math.fsum(layer["errors"][index] for layer in layers.values()),
            }
        for end in self.ends:
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
    """Sort the model's parameters, and compute every layer's size. Reads no weight.

    Raises:
        PluginError, OptionError: a quantizer, an option, a pattern or a combination is refused;
            the budget is too small.
        ShapeError: a quantizer can't take a layer's shape; the message names the layer.
        ModelError: the model has no decoder blocks.
        DataError: there is only one calibration sample.
    """
    if calibration is None:
        raise OptionError("budget: expected a calibration text to measure errors on, got none")
    if len(calibration.ids) < 2:
        raise DataError(
            "budget: expected at least 2 calibration samples, one of them to judge by, got 1; "
            "give more text or shorter samples (seq_len)"
        )
    quantizers = [choice.create() for choice in budget.choices]
    _check_distinct(budget.choices, quantizers)
    check_rescales(quantizers, calibration)
    linears, ends, dense = selection.sort(source)
    outside = linears_outside_blocks(source, linears)
    selection.refuse(outside, OUTSIDE, "leave it dense, or quantize without --budget")
    dense |= {linear.name: OUTSIDE for linear in outside}
    linears = [linear for linear in linears if linear not in outside]
    if not linears:
        raise OptionError(
            "budget: expected linear layers to choose for, got none; leave out --include or "
            "--exclude"
        )
    sizes: dict[str, list[int]] = {linear.name: [] for linear in linears}
    for index in range(len(quantizers)):
        sites, weights = packed_sites(linears, quantizers, dict.fromkeys(sizes, index))
        for name, site in weights.items():
            sizes[name].append(sites[site].nbytes)
    with_those, of_ends = with_ends(quantizers, ends)
    sites, weights = packed_sites([end.site for end in ends], with_those, of_ends)
    others = source.parameters.keys() - sizes.keys() - of_ends.keys()
    mixture = Mixture(
        source, budget, quantizers, linears, sizes, ends,
        ends_bytes=sum(sites[index].nbytes for index in weights.values()),
        dense=dense,
        dense_bytes=sum(source.parameters[name].nbytes for name in others),
        calibration=calibration, seed=seed,
    )  # fmt: skip
    _check_budget(mixture)
    return mixture


def _check_distinct(choices: Sequence[Choice], quantizers: Sequence[Quantizer]) -> None:
    if len(choices) < 2:
        raise OptionError(
            f"choices: expected two or more to choose from, got {len(choices)}; for one quantizer "
            "everywhere use -q NAME"
        )
    seen: dict[str, str] = {}
    for choice, quantizer in zip(choices, quantizers, strict=True):
        same = f"{choice.quantizer} {quantizer.options.model_dump_json()}"
        if same in seen:
            raise OptionError(
                f"choices: expected each once, got {seen[same]} and {choice.label}, which are the "
                "same"
            )
        seen[same] = choice.label


def _check_budget(mixture: Mixture) -> None:
    layers = sum(map(min, mixture.sizes.values()))
    least, given = mixture.fixed_bytes + layers, mixture.budget.nbytes
    ends = ", ".join(f"{end.site.module} by {end.choice.label}" for end in mixture.ends)
    if given < least:
        raise OptionError(
            f"budget: expected at least {least} bytes ({_mib(least)}), got {given} ({_mib(given)}):"
            f" dense tensors take {_mib(mixture.dense_bytes)}, "
            f"{f'{ends} {_mib(mixture.ends_bytes)}, ' if ends else ''}and the smallest choice for "
            f"every layer {_mib(layers)}; give more, or smaller choices"
        )


def _mib(nbytes: int) -> str:
    return f"{nbytes / 2**20:,.2f} MiB"
