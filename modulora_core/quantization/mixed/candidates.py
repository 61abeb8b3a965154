"""What a mixed checkpoint may be made of: known, and refused, before any weight is read."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from modulora_core.calibration import CalibrationText, find_blocks
from modulora_core.checkpoints.record import Recipe
from modulora_core.errors import DataError, OptionError
from modulora_core.models import ModelSource
from modulora_core.models.ends import End, find_ends
from modulora_core.models.sites import LinearSite, find_sites
from modulora_core.quantization.layout import (
    Plan,
    check_rescales,
    choice_of_end,
    layout_of,
    plan_choices,
)
from modulora_core.registry import Choice
from modulora_core.spec import PackedLayout, Quantizer

OUTSIDE = "outside of the decoder blocks, where no error is measured"
"""Why a linear layer is kept that isn't in a block."""


@dataclass(frozen=True, slots=True)
class Candidates:
    """Every layer, and what it takes with every choice.

    Attributes:
        choices: what was asked for; quantizers: of each.
        linears: the layers that are chosen for, all in decoder blocks.
        ends: the head and the embedding, where they are packed too, by what was asked for; ends_bytes: of them, packed.
        kept: name → reason of every other parameter; kept_bytes: of these, as they will be stored.
        layouts: how a choice, by its index, packs a matrix of a shape.
        calibration: the samples.
        seed: of packing.
    """

    choices: tuple[Choice, ...]
    quantizers: tuple[Quantizer, ...]
    linears: tuple[LinearSite, ...]
    ends: tuple[End, ...]
    ends_bytes: int
    kept: Mapping[str, str]
    kept_bytes: int
    layouts: Mapping[tuple[int, tuple[int, int]], PackedLayout]
    calibration: CalibrationText
    seed: int

    def nbytes(self, linear: LinearSite, choice: int) -> int:
        """Bytes of a packed layer, of all its matrices."""
        shape = (linear.out_features, linear.in_features)
        return self.layouts[choice, shape].nbytes * (linear.experts or 1)

    @property
    def fixed_bytes(self) -> int:
        """Bytes of all that isn't chosen for."""
        return self.kept_bytes + self.ends_bytes

    @property
    def smallest(self) -> int:
        """Bytes of the checkpoint with the smallest choice everywhere."""
        return self.fixed_bytes + sum(min(self._sizes(linear)) for linear in self.linears)

    @property
    def largest(self) -> int:
        """Bytes of the checkpoint with the largest choice everywhere."""
        return self.fixed_bytes + sum(max(self._sizes(linear)) for linear in self.linears)

    def _sizes(self, linear: LinearSite) -> list[int]:
        return [self.nbytes(linear, choice) for choice in range(len(self.choices))]

    def plan(
        self, source: ModelSource, taken: Mapping[str, int], budget: int, max_shard_bytes: int
    ) -> Plan:
        """The plan in which each layer is packed by its choice; choices that no layer has are left out of it."""
        used = sorted(set(taken.values()))
        quantizers = [self.quantizers[choice] for choice in used]
        wanted = any(quantizer.spec.calibration != "none" for quantizer in quantizers)
        tuned = self.calibration.config.tuning is not None
        of = {name: used.index(choice) for name, choice in taken.items()}
        of |= {
            end.site.name: choice_of_end(end, quantizers) for end in self.ends
        }  # may add to quantizers
        return plan_choices(
            source, quantizers, [*self.linears, *(end.site for end in self.ends)], self.kept, lambda linear: of[linear.name],
            calibration=self.calibration if wanted or tuned else None, seed=self.seed, max_shard_bytes=max_shard_bytes,
            allocation=self.to_json(budget),
        )  # fmt: skip

    def to_json(self, budget: int) -> dict[str, Any]:
        """For the checkpoint's record: equal ones, of the same model, lead to the same choice."""
        recipes = [Recipe.of(quantizer).to_json() for quantizer in self.quantizers]
        ends = {end.site.name: Recipe.of(end.choice.create()).to_json() for end in self.ends}
        return {
            "budget": budget, "choices": recipes, "measured_on": self.calibration.to_json(),
            **({"ends": ends} if ends else {}),
        }  # fmt: skip


def find_candidates(
    source: ModelSource,
    choices: Sequence[Choice],
    calibration: CalibrationText,
    *,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    head: Choice | None = None,
    embeddings: Choice | None = None,
    seed: int = 0,
) -> Candidates:
    """Sort the model's parameters, and ask every quantizer about every shape. Reads no weight.

    Raises:
        PluginError, OptionError: a quantizer or an option can't be used; fewer than two choices, or two that are the same; a pattern
            matches nothing, or names a layer outside of the blocks; tuning is wanted and no quantizer's packed weights can be rescaled;
            an end can't be packed, or its quantizer needs calibration.
        ShapeError: a quantizer can't take a layer's shape; the message names the layer.
        ModelError: the model has no decoder blocks.
        DataError: there is one calibration sample only.
    """
    if len(calibration.ids) < 2:
        raise DataError(
            "budget: expected at least 2 calibration samples, one of them to judge by, got 1; give more text or shorter samples (seq_len)"
        )
    quantizers = tuple(choice.create() for choice in choices)
    _check_distinct(choices, quantizers)
    check_rescales(quantizers, calibration)
    skeleton = source.skeleton()
    found = find_sites(skeleton, include=include, exclude=exclude)
    ends = {end.site.name: end for end in find_ends(skeleton, head, embeddings, source.parameters)}
    blocks = tuple(f"{path}." for path in find_blocks(skeleton))
    linears = tuple(linear for linear in found.linears if linear.name.startswith(blocks))
    outside = [
        linear for linear in found.linears if linear not in linears and linear.name not in ends
    ]
    _refuse_named(outside, include)
    if not linears:
        raise OptionError(
            "budget: expected linear layers to choose for, got none; leave out --include or --exclude"
        )
    stays = {name: reason for name, reason in found.kept.items() if name not in ends}
    stays |= dict.fromkeys((linear.name for linear in outside), OUTSIDE)
    packed = ends.keys() | {linear.name for linear in linears}
    return Candidates(
        tuple(choices), quantizers, linears, tuple(ends.values()), _bytes_of(ends.values(), quantizers), stays,
        sum(info.nbytes for name, info in source.parameters.items() if name not in packed),
        _layouts(linears, quantizers), calibration, seed,
    )  # fmt: skip


def _layouts(
    linears: Sequence[LinearSite], quantizers: Sequence[Quantizer]
) -> dict[tuple[int, tuple[int, int]], PackedLayout]:
    layouts: dict[tuple[int, tuple[int, int]], PackedLayout] = {}
    for index, quantizer in enumerate(quantizers):
        for linear in linears:
            shape = (linear.out_features, linear.in_features)
            if (index, shape) not in layouts:
                layouts[index, shape] = layout_of(quantizer, shape, linear)
    return layouts


def _bytes_of(ends: Iterable[End], quantizers: Sequence[Quantizer]) -> int:
    """Of packed ends. Raises OptionError, PluginError, ShapeError where one can't be packed by its quantizer."""
    known = list(quantizers)
    total = 0
    for end in ends:
        quantizer = known[choice_of_end(end, known)]
        total += layout_of(
            quantizer, (end.site.out_features, end.site.in_features), end.site
        ).nbytes
    return total


def _check_distinct(choices: Sequence[Choice], quantizers: Sequence[Quantizer]) -> None:
    if len(choices) < 2:
        raise OptionError(
            f"choices: expected two or more to choose from, got {len(choices)}; for one quantizer everywhere use -q NAME"
        )
    seen: dict[str, str] = {}
    for choice, quantizer in zip(choices, quantizers, strict=True):
        same = f"{choice.quantizer} {quantizer.options.model_dump_json()}"
        if same in seen:
            raise OptionError(
                f"choices: expected each once, got {seen[same]} and {choice.label}, which are the same"
            )
        seen[same] = choice.label


def _refuse_named(outside: Sequence[LinearSite], include: Sequence[str]) -> None:
    for linear in outside:
        for pattern in include:
            if any(fnmatch.fnmatchcase(name, pattern) for name in (linear.module, linear.name)):
                raise OptionError(
                    f"--include {pattern}: {linear.module} is {OUTSIDE}; leave it dense, or quantize without --budget"
                )
