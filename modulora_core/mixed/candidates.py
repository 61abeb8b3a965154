"""What a mixed checkpoint may be made of: known, and refused, before any weight is read."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from modulora_core import registry
from modulora_core.calibration import CalibrationText, find_blocks
from modulora_core.errors import DataError, OptionError
from modulora_core.options import parse_options
from modulora_core.quantization_plan import Plan, check_rescales, layout_of, plan_choices
from modulora_core.record import Recipe
from modulora_core.sites import LinearSite, find_sites
from modulora_core.sources import ModelSource
from modulora_core.spec import PackedLayout, Quantizer

OUTSIDE = "outside of the decoder blocks, where no error is measured"
"""Why a linear layer is kept that isn't in a block."""


@dataclass(frozen=True, slots=True)
class Choice:
    """A quantizer that layers may be packed by, with its options."""

    quantizer: str
    options: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def parse(cls, text: str) -> Choice:
        """Read ``NAME`` or ``NAME:KEY=VALUE,...``. Raises OptionError when it is neither."""
        name, colon, options = text.partition(":")
        if not name or (colon and not options):
            raise OptionError(f"choice: expected NAME or NAME:KEY=VALUE,..., got {text!r}")
        return cls(name, parse_options(options.split(",") if options else []))

    @property
    def label(self) -> str:
        """As :meth:`parse` reads it."""
        options = ",".join(f"{key}={value}" for key, value in self.options.items())
        return f"{self.quantizer}:{options}" if options else self.quantizer


@dataclass(frozen=True, slots=True)
class Candidates:
    """Every layer, and what it takes with every choice.

    Attributes:
        choices: what was asked for; quantizers: of each.
        linears: the layers that are packed, all in decoder blocks; kept: name → reason of every other parameter.
        layouts: how a choice, by its index, packs a matrix of a shape.
        kept_bytes: of all that isn't packed, as it will be stored.
        calibration: the samples.
        seed: of packing.
    """

    choices: tuple[Choice, ...]
    quantizers: tuple[Quantizer, ...]
    linears: tuple[LinearSite, ...]
    kept: Mapping[str, str]
    layouts: Mapping[tuple[int, tuple[int, int]], PackedLayout]
    kept_bytes: int
    calibration: CalibrationText
    seed: int

    def nbytes(self, linear: LinearSite, choice: int) -> int:
        """Bytes of a packed layer, of all its matrices."""
        shape = (linear.out_features, linear.in_features)
        return self.layouts[choice, shape].nbytes * (linear.experts or 1)

    @property
    def smallest(self) -> int:
        """Bytes of the checkpoint with the smallest choice everywhere."""
        return self.kept_bytes + sum(min(self._sizes(linear)) for linear in self.linears)

    @property
    def largest(self) -> int:
        """Bytes of the checkpoint with the largest choice everywhere."""
        return self.kept_bytes + sum(max(self._sizes(linear)) for linear in self.linears)

    def _sizes(self, linear: LinearSite) -> list[int]:
        return [self.nbytes(linear, choice) for choice in range(len(self.choices))]

    def plan(self, source: ModelSource, taken: Mapping[str, int], budget: int, max_shard_bytes: int) -> Plan:
        """The plan in which each layer is packed by its choice; choices that no layer has are left out of it."""
        used = sorted(set(taken.values()))
        quantizers = [self.quantizers[choice] for choice in used]
        wanted = any(quantizer.spec.calibration != "none" for quantizer in quantizers)
        tuned = self.calibration.config.tuning is not None
        return plan_choices(
            source, quantizers, self.linears, self.kept, lambda linear: used.index(taken[linear.name]),
            calibration=self.calibration if wanted or tuned else None, seed=self.seed, max_shard_bytes=max_shard_bytes,
            allocation=self.to_json(budget),
        )  # fmt: skip

    def to_json(self, budget: int) -> dict[str, Any]:
        """For the checkpoint's record: equal ones, of the same model, lead to the same choice."""
        recipes = [Recipe.of(quantizer).to_json() for quantizer in self.quantizers]
        return {"budget": budget, "choices": recipes, "measured_on": self.calibration.to_json()}


def find_candidates(
    source: ModelSource,
    choices: Sequence[Choice],
    calibration: CalibrationText,
    *,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    seed: int = 0,
) -> Candidates:
    """Sort the model's parameters, and ask every quantizer about every shape. Reads no weight.

    Raises:
        PluginError, OptionError: a quantizer or an option can't be used; fewer than two choices, or two that are the same; a pattern
            matches nothing, or names a layer outside of the blocks; tuning is wanted and no quantizer's packed weights can be rescaled.
        ShapeError: a quantizer can't take a layer's shape; the message names the layer.
        ModelError: the model has no decoder blocks.
        DataError: there is one calibration sample only.
    """
    if len(calibration.ids) < 2:
        raise DataError(
            "budget: expected at least 2 calibration samples, one of them to judge by, got 1; give more text or shorter samples (seq_len)"
        )
    quantizers = tuple(registry.create(choice.quantizer, choice.options) for choice in choices)
    _check_distinct(choices, quantizers)
    check_rescales(quantizers, calibration)
    skeleton = source.skeleton()
    found = find_sites(skeleton, include=include, exclude=exclude)
    blocks = tuple(f"{path}." for path in find_blocks(skeleton))
    outside = [linear for linear in found.linears if not linear.name.startswith(blocks)]
    _refuse_named(outside, include)
    linears = tuple(linear for linear in found.linears if linear not in outside)
    if not linears:
        raise OptionError(
            "budget: expected linear layers to choose for, got none; leave out --include or --exclude"
        )
    layouts: dict[tuple[int, tuple[int, int]], PackedLayout] = {}
    for index, quantizer in enumerate(quantizers):
        for linear in linears:
            shape = (linear.out_features, linear.in_features)
            if (index, shape) not in layouts:
                layouts[index, shape] = layout_of(quantizer, shape, linear)
    packed = {linear.name for linear in linears}
    kept_bytes = sum(info.nbytes for name, info in source.parameters.items() if name not in packed)
    kept = dict(found.kept) | dict.fromkeys((linear.name for linear in outside), OUTSIDE)
    return Candidates(tuple(choices), quantizers, linears, kept, layouts, kept_bytes, calibration, seed)


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
