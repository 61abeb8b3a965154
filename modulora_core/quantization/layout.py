"""Decides how every parameter is stored, before any weight is read.

A quantizer packs each parameter, or the parameter stays dense. The name, dtype and shape of every
tensor in the files follow.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

from modulora_core.arguments import check_fields
from modulora_core.calibration import CalibrationText, block_prefixes
from modulora_core.checkpoints.record import (
    PackedSite,
    QuantizationRecord,
    Recipe,
    by_reason,
    packed_sites,
)
from modulora_core.errors import OptionError
from modulora_core.models import ModelSource
from modulora_core.models.ends import End, find_ends
from modulora_core.models.sites import LinearSite, find_sites, tied_to
from modulora_core.registry import Choice
from modulora_core.spec import Quantizer, TensorLayout
from modulora_core.version import VERSION

OUTSIDE = "outside of the decoder blocks, where nothing is calibrated"


@dataclass(frozen=True, slots=True)
class Override:
    """Another quantizer for the modules whose dotted path matches ``pattern`` (fnmatch)."""

    pattern: str
    quantizer: str
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def choice(self) -> Choice:
        return Choice(self.quantizer, self.options)


@dataclass(frozen=True, slots=True)
class Layout:
    """The files that quantizing a model will write.

    Attributes:
        record: the checkpoint's ``quantization_config``.
        quantizers: one for each recipe of the record.
        tensors: every tensor of the files, in their order.
        linears: the packed parameters.
        calibration: the samples; None if no quantizer uses any.
        table: how a budget chose, if one did
            (:meth:`modulora_core.quantization.mixed.mixture.Mixture.table`).
    """

    record: QuantizationRecord
    quantizers: tuple[Quantizer, ...]
    tensors: Mapping[str, TensorLayout]
    linears: tuple[LinearSite, ...]
    calibration: CalibrationText | None
    table: dict[str, Any] | None = None

    def quantizer(self, site: PackedSite) -> Quantizer:
        return self.quantizers[site.recipe]

    def quantizer_of(self, name: str) -> Quantizer:
        """The quantizer that packs a parameter."""
        return self.quantizer(self.record.site(name))

    def candidates(self, name: str) -> Sequence[Quantizer]:
        """The quantizers that may pack a parameter."""
        return [self.quantizer_of(name)]

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())

    @property
    def request(self) -> dict[str, Any]:
        """Identifies a run: equal requests give equal checkpoints."""
        return self.record.to_json()

    def made(self, record: QuantizationRecord) -> bool:
        """Whether this request made a checkpoint, perhaps with another version of this package.

        The values of the weights are not compared.
        """
        changed = {"core_version": VERSION, "contents": None}
        return record.model_copy(update=changed).to_json() == self.request


@dataclass(frozen=True, slots=True)
class Selection:
    """The user's choice of parameters to pack, as in :func:`quantize`.

    Attributes:
        include, exclude: patterns of linear layers; head, embeddings: quantizers of the ends.
    """

    include: Sequence[str] = ()
    exclude: Sequence[str] = ()
    head: Choice | None = None
    embeddings: Choice | None = None

    def __post_init__(self) -> None:
        check_fields(self)

    def sort(self, source: ModelSource) -> tuple[list[LinearSite], list[End], dict[str, str]]:
        """The linear layers and the ends to pack, and name → reason of all dense parameters."""
        model = source.outline
        found = find_sites(model, include=self.include, exclude=self.exclude)
        ends = find_ends(model, self.head, self.embeddings, source.parameters)
        packed = {end.site.name for end in ends}
        linears = [linear for linear in found.linears if linear.name not in packed]
        return linears, ends, {name: why for name, why in found.dense.items() if name not in packed}

    def refuse(self, linears: Sequence[LinearSite], reason: str, advice: str) -> None:
        """Raise OptionError if ``include`` names one of ``linears``, which stay dense."""
        for linear in linears:
            for pattern in self.include:
                if any(fnmatchcase(name, pattern) for name in (linear.module, linear.name)):
                    raise OptionError(f"--include {pattern}: {linear.module} is {reason}; {advice}")


def uses_output_moment(linear: LinearSite, quantizer: Quantizer) -> bool:
    """Whether the quantizer packs a layer in a decoder block with H_O, if there is one."""
    uses = quantizer.wants_calibration and quantizer.spec.output_hessian
    return linear.experts is None and uses


def linears_outside_blocks(source: ModelSource, linears: Sequence[LinearSite]) -> list[LinearSite]:
    """The layers outside of the decoder blocks, such as an output head."""
    inside = block_prefixes(source)
    return [linear for linear in linears if not linear.name.startswith(inside)]


def choose_layout(
    source: ModelSource,
    choices: Sequence[Choice],
    patterns: Sequence[str],
    selection: Selection,
    *,
    calibration: CalibrationText | None,
    seed: int,
) -> Layout:
    """Choose how every parameter is stored. Reads no weight.

    Args:
        choices: for the layers that match no pattern, then for each of ``patterns`` in turn.
        patterns: patterns of dotted paths (fnmatch); the last match counts.

    Raises:
        PluginError, OptionError: a quantizer, an option, a pattern or a combination is refused.
        ShapeError: a quantizer can't take a layer's shape; the message names the layer.
        ModelError: calibration is wanted and the model has no decoder blocks.
    """
    quantizers = [choice.create() for choice in choices]
    _check_calibration(quantizers, calibration)
    linears, ends, dense = selection.sort(source)
    chosen = _chosen(linears, patterns)
    if calibration is not None:
        required = [
            linear
            for linear in linears_outside_blocks(source, linears)
            if quantizers[chosen[linear.name]].spec.calibration == "required"
        ]
        advice = "give it a quantizer that needs no calibration: --override 'GLOB=NAME'"
        selection.refuse(required, OUTSIDE, advice)
        dense |= {linear.name: OUTSIDE for linear in required}
        linears = [linear for linear in linears if linear not in required]
    if not (linears or ends):
        stays = "; ".join(f"{reason}: {len(names)}" for reason, names in by_reason(dense).items())
        raise OptionError(
            f"quantize {source.location.model}: expected one weight or more to pack, all stay as "
            f"they are ({stays}); leave out fewer with --include and --exclude, or name a "
            "quantizer for an end with --quantize-head or --quantize-embeddings"
        )
    quantizers, of_ends = with_ends(quantizers, ends)
    chosen |= of_ends
    linears += [end.site for end in ends]
    return layout_with(
        source, quantizers, linears, chosen, dense, calibration=calibration, seed=seed
    )


def _chosen(linears: Sequence[LinearSite], patterns: Sequence[str]) -> dict[str, int]:
    """The recipe of each layer: the number of the last pattern that matches, else 0."""
    chosen = dict.fromkeys((linear.name for linear in linears), 0)
    for recipe, pattern in enumerate(patterns, 1):
        names = [x.name for x in linears if fnmatchcase(x.module, pattern)]
        if not names:
            raise OptionError(
                f"override {pattern!r}: matches none of the {len(linears)} linear "
                f"layers, such as {linears[0].module if linears else '(none)'}"
            )
        chosen |= dict.fromkeys(names, recipe)
    return chosen


def with_ends(
    quantizers: Sequence[Quantizer], ends: Sequence[End]
) -> tuple[list[Quantizer], dict[str, int]]:
    """Add the quantizers of the ends that are missing, and find each end's.

    Returns:
        all quantizers, and the index of the quantizer of each end, by the end's parameter.

    Raises:
        PluginError, OptionError: a quantizer or an option is refused, or it needs calibration.
    """
    all_of_them, chosen = list(quantizers), dict[str, int]()
    known = [(each.spec.name, each.options) for each in all_of_them]
    for end in ends:
        quantizer = end.choice.create()
        if quantizer.spec.calibration == "required":
            raise OptionError(
                f"--{end.option} {quantizer.spec.name}: it needs calibration, and nothing is "
                "calibrated outside of the decoder blocks; choose a quantizer that needs none"
            )
        wanted = quantizer.spec.name, quantizer.options
        if wanted not in known:
            known.append(wanted)
            all_of_them.append(quantizer)
        chosen[end.site.name] = known.index(wanted)
    return all_of_them, chosen


def layout_with(
    source: ModelSource,
    quantizers: Sequence[Quantizer],
    linears: Sequence[LinearSite],
    chosen: Mapping[str, int],
    dense: Mapping[str, str],
    *,
    calibration: CalibrationText | None,
    seed: int,
    allocation: Mapping[str, Any] | None = None,
) -> Layout:
    """The layout with each of ``linears`` packed by ``quantizers[chosen[name]]``.

    Args:
        dense: name → reason of every other parameter. A parameter that is tied to a packed one is
            packed with it, and not recorded.
        allocation: the record's entry about a budget.
    """
    sites, weights = packed_sites(linears, quantizers, chosen)
    packed_too = {tied_to(name) for name in weights}
    record = QuantizationRecord(
        core_version=VERSION,
        seed=seed,
        source=source.identity(),
        calibration=None if calibration is None else calibration.to_json(),
        recipes=tuple(Recipe.of(quantizer) for quantizer in quantizers),
        sites=sites,
        weights=weights,
        kept=by_reason({n: reason for n, reason in dense.items() if reason not in packed_too}),
        allocation=allocation,
    )
    tensors = dict(_stored_tensors(source, record))
    return Layout(record, tuple(quantizers), tensors, tuple(linears), calibration)


def _check_calibration(choices: Sequence[Quantizer], calibration: CalibrationText | None) -> None:
    if calibration is None:
        for choice in choices:
            if choice.spec.calibration == "required":
                raise OptionError(
                    f"{choice.spec.name}: expected a calibration text, got none; give one: "
                    "--calibration SOURCE, such as a .txt file, or pydoc"
                )
        return
    check_rescales(choices, calibration)
    if calibration.config.tuning is None and not any(c.wants_calibration for c in choices):
        names = ", ".join(dict.fromkeys(choice.spec.name for choice in choices))
        raise OptionError(
            f"calibration {calibration.config.source}: {names} uses none with these options; "
            "leave --calibration out"
        )


def check_rescales(choices: Sequence[Quantizer], calibration: CalibrationText) -> None:
    """Raise OptionError if tuning is wanted and none of ``choices`` can rescale packed weights."""
    rescale = any(choice.spec.rescales for choice in choices)
    if calibration.config.tuning is not None and not rescale:
        names = ", ".join(dict.fromkeys(choice.spec.name for choice in choices))
        raise OptionError(
            "tuning: expected a quantizer whose packed weights can be rescaled, got "
            f"{names}; leave --tune-epochs out"
        )


def _stored_tensors(
    source: ModelSource, record: QuantizationRecord
) -> Iterator[tuple[str, TensorLayout]]:
    for name, info in source.parameters.items():
        if name in record.weights:
            yield from record.site(name).tensors(name)
        else:
            yield name, TensorLayout.of(info)
    yield from record.guard.items()
