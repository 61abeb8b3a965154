"""Lists the layers and the quantizers that a budget chooses from, and refuses what can't work."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from modulora_core.calibration import CalibrationText
from modulora_core.checkpoints.record import Recipe
from modulora_core.errors import DataError, OptionError
from modulora_core.models import ModelSource
from modulora_core.models.ends import End
from modulora_core.models.sites import LinearSite
from modulora_core.quantization.layout import (
    Layout,
    Selection,
    check_rescales,
    choice_of_end,
    layout_with,
    linears_outside_blocks,
    packed_sites,
)
from modulora_core.registry import Choice
from modulora_core.spec import Quantizer

OUTSIDE = "outside of the decoder blocks, where no error is measured"


@dataclass(frozen=True, slots=True)
class Candidates:
    """Every layer, and its size under every choice.

    Attributes:
        choices: the user's choices; quantizers: their quantizers.
        linears: the layers to choose for, all of them in decoder blocks.
        sizes: by layer, its packed bytes under each choice.
        ends: the packed head and embedding; ends_bytes: their packed size.
        kept: name → reason of every other parameter; kept_bytes: their size.
        calibration: the samples.
        seed: of packing.
    """

    choices: tuple[Choice, ...]
    quantizers: tuple[Quantizer, ...]
    linears: tuple[LinearSite, ...]
    sizes: Mapping[str, Sequence[int]]
    ends: tuple[End, ...]
    ends_bytes: int
    kept: Mapping[str, str]
    kept_bytes: int
    calibration: CalibrationText
    seed: int

    @property
    def fixed_bytes(self) -> int:
        """The size of everything that is not chosen for."""
        return self.kept_bytes + self.ends_bytes

    @property
    def smallest(self) -> int:
        """The size of the checkpoint with the smallest choice for every layer."""
        return self.fixed_bytes + sum(map(min, self.sizes.values()))

    @property
    def largest(self) -> int:
        """The size of the checkpoint with the largest choice for every layer."""
        return self.fixed_bytes + sum(map(max, self.sizes.values()))

    def layout(
        self, source: ModelSource, taken: Mapping[str, int], budget: int, max_shard_bytes: int
    ) -> Layout:
        """The layout with each layer packed by its choice; it has no unused quantizer."""
        used = sorted(set(taken.values()))
        quantizers = [self.quantizers[choice] for choice in used]
        calibrated = any(quantizer.spec.calibration != "none" for quantizer in quantizers)
        tuned = self.calibration.config.tuning is not None
        chosen = {name: used.index(choice) for name, choice in taken.items()}
        chosen |= {end.site.name: choice_of_end(end, quantizers) for end in self.ends}
        linears = [*self.linears, *(end.site for end in self.ends)]
        return layout_with(
            source, quantizers, linears, chosen, self.kept,
            calibration=self.calibration if calibrated or tuned else None, seed=self.seed,
            max_shard_bytes=max_shard_bytes, allocation=self.to_json(budget),
        )  # fmt: skip

    def to_json(self, budget: int) -> dict[str, Any]:
        """The record's entry. For one model, equal entries lead to the same choice."""
        recipes = [Recipe.of(quantizer).to_json() for quantizer in self.quantizers]
        ends = {end.site.name: Recipe.of(end.choice.create()).to_json() for end in self.ends}
        return {
            "budget": budget,
            "choices": recipes,
            "measured_on": self.calibration.to_json(),
            **({"ends": ends} if ends else {}),
        }


def find_candidates(
    source: ModelSource,
    choices: Sequence[Choice],
    calibration: CalibrationText,
    selection: Selection,
    *,
    seed: int = 0,
) -> Candidates:
    """Sort the model's parameters, and compute every layer's size. Reads no weight.

    Raises:
        PluginError, OptionError: a quantizer, an option, a pattern or a combination is refused.
        ShapeError: a quantizer can't take a layer's shape; the message names the layer.
        ModelError: the model has no decoder blocks.
        DataError: there is only one calibration sample.
    """
    if len(calibration.ids) < 2:
        raise DataError(
            "budget: expected at least 2 calibration samples, one of them to judge by, got 1; "
            "give more text or shorter samples (seq_len)"
        )
    quantizers = tuple(choice.create() for choice in choices)
    _check_distinct(choices, quantizers)
    check_rescales(quantizers, calibration)
    linears, ends, kept = selection.sort(source)
    outside = linears_outside_blocks(source, linears)
    selection.refuse(outside, OUTSIDE, "leave it dense, or quantize without --budget")
    linears = [linear for linear in linears if linear not in outside]
    if not linears:
        raise OptionError(
            "budget: expected linear layers to choose for, got none; leave out --include or "
            "--exclude"
        )
    kept |= {linear.name: OUTSIDE for linear in outside}
    with_ends = list(quantizers)
    of_ends = {end.site.name: choice_of_end(end, with_ends) for end in ends}
    stored = source.parameters
    return Candidates(
        tuple(choices),
        quantizers,
        tuple(linears),
        _sizes(linears, quantizers),
        tuple(ends),
        sum(
            site.nbytes for site in packed_sites([end.site for end in ends], with_ends, of_ends)[0]
        ),
        kept,
        sum(
            stored[name].nbytes
            for name in stored.keys() - of_ends.keys() - {x.name for x in linears}
        ),
        calibration,
        seed,
    )


def _sizes(linears: Sequence[LinearSite], quantizers: Sequence[Quantizer]) -> dict[str, list[int]]:
    """The packed bytes of each layer under each quantizer."""
    sizes: dict[str, list[int]] = {linear.name: [] for linear in linears}
    for index in range(len(quantizers)):
        sites, weights = packed_sites(linears, quantizers, dict.fromkeys(sizes, index))
        for name, site in weights.items():
            sizes[name].append(sites[site].nbytes)
    return sizes


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
