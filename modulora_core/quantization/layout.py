"""Decides how every parameter is stored, before any weight is read.

A quantizer packs each parameter, or the parameter stays dense. The name, dtype and shape of every
tensor in the files follow.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

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
from modulora_core.quantization.assignment import Assignment
from modulora_core.spec import Quantizer, TensorLayout
from modulora_core.version import VERSION

DENSE = "dense in the assignment"
OUTSIDE = "outside of the decoder blocks, where nothing is calibrated"


@dataclass(frozen=True, slots=True)
class PackedEntry:
    """One packed parameter.

    Attributes:
        linear: its place in the model; site: its tensors in the files.
        in_block: whether it is in a decoder block, where a calibration reaches it.
    """

    linear: LinearSite
    site: PackedSite
    quantizer: Quantizer
    in_block: bool

    @property
    def uses_output_moment(self) -> bool:
        """Whether it is packed with H_O, if the tokens are weighted by the loss."""
        uses = self.quantizer.wants_calibration and self.quantizer.spec.output_hessian
        return self.in_block and self.linear.experts is None and uses


@dataclass(frozen=True, slots=True)
class Layout:
    """The files that quantizing a model will write.

    Attributes:
        record: the checkpoint's ``quantization_config``. It identifies a run: equal records, with
            shards of one size, give equal checkpoints.
        packed: the packed parameters by name.
        tensors: every tensor of the files, in their order.
        calibration: the samples; None if no quantizer uses any.
    """

    record: QuantizationRecord
    packed: Mapping[str, PackedEntry]
    tensors: Mapping[str, TensorLayout]
    calibration: CalibrationText | None

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())


def choose_layout(
    source: ModelSource,
    assignment: Assignment,
    *,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    calibration: CalibrationText | None,
    seed: int,
) -> Layout:
    """Choose how every parameter is stored. Reads no weight.

    Raises PluginError, OptionError, ShapeError, ModelError.
    """
    created = {pattern: assignment.create(pattern) for pattern in (None, *assignment.layers)}
    quantizers = [each for each in created.values() if each is not None]
    _check_calibration(quantizers, calibration)
    found = find_sites(source.outline, include=include, exclude=exclude)
    ends = find_ends(source.outline, assignment.head, assignment.embeddings, source.parameters)
    at_ends = {end.site.name for end in ends}
    dense = {name: reason for name, reason in found.dense.items() if name not in at_ends}
    linears = [linear for linear in found.linears if linear.name not in at_ends]
    patterns = assignment.patterns_of(linears)
    inside = () if calibration is None else block_prefixes(source)
    chosen: list[tuple[LinearSite, Quantizer]] = []
    for linear in linears:
        quantizer = created[patterns[linear.name]]
        is_inside = linear.name.startswith(inside)
        if quantizer is None:
            dense[linear.name] = DENSE
        elif not (is_inside or calibration is None) and quantizer.spec.calibration == "required":
            _refuse_included(linear, include)
            dense[linear.name] = OUTSIDE
        else:
            chosen.append((linear, quantizer))
    for end in ends:
        with assignment.named(end.option.removeprefix("quantize-")):
            chosen.append((end.site, end_quantizer(end)))
    if not chosen:
        stays = "; ".join(f"{reason}: {len(names)}" for reason, names in by_reason(dense).items())
        raise OptionError(
            f"quantize {source.location.model}: expected one weight or more to pack, all stay as "
            f"they are ({stays}); leave out fewer with --include and --exclude, or name a "
            "quantizer for an end with --quantize-head or --quantize-embeddings"
        )
    distinct = {_key(each): each for each in (*quantizers, *(each for _, each in chosen))}
    numbers = {key: number for number, key in enumerate(distinct)}
    recipes = {linear.name: numbers[_key(quantizer)] for linear, quantizer in chosen}
    sites, weights = packed_sites(
        [linear for linear, _ in chosen], list(distinct.values()), recipes
    )
    packed_too = {tied_to(name) for name in weights}  # a tied parameter is not recorded
    record = QuantizationRecord(
        core_version=VERSION,
        seed=seed,
        source=source.identity(),
        calibration=None if calibration is None else calibration.to_json(),
        recipes=tuple(map(Recipe.of, distinct.values())),
        sites=sites,
        weights=weights,
        kept=by_reason({n: reason for n, reason in dense.items() if reason not in packed_too}),
    )
    packed = {
        linear.name: PackedEntry(
            linear, record.site(linear.name), quantizer, linear.name.startswith(inside)
        )
        for linear, quantizer in chosen
    }
    return Layout(record, packed, dict(_stored_tensors(source, record)), calibration)


def _refuse_included(linear: LinearSite, include: Sequence[str]) -> None:
    """Raise OptionError if ``include`` names a layer that stays dense, outside of the blocks."""
    for pattern in include:
        if any(fnmatchcase(name, pattern) for name in (linear.module, linear.name)):
            raise OptionError(
                f"--include {pattern}: {linear.module} is {OUTSIDE}; give it a quantizer that "
                "needs no calibration: --override 'GLOB=NAME'"
            )


def _key(quantizer: Quantizer) -> tuple[str, str]:
    """Name and options: equal for equal quantizers."""
    return quantizer.spec.name, quantizer.options.model_dump_json()


def end_quantizer(end: End) -> Quantizer:
    """The quantizer of a head or an embedding. Raises PluginError, OptionError."""
    quantizer = end.choice.create()
    if quantizer.spec.calibration == "required":
        raise OptionError(
            f"--{end.option} {quantizer.spec.name}: it needs calibration, and nothing is "
            "calibrated outside of the decoder blocks; choose a quantizer that needs none"
        )
    return quantizer


def _check_calibration(
    quantizers: Sequence[Quantizer], calibration: CalibrationText | None
) -> None:
    if calibration is None:
        for quantizer in quantizers:
            quantizer.spec.check_text(None)
        return
    check_rescales(quantizers, calibration)
    if calibration.config.tuning is None and not any(q.wants_calibration for q in quantizers):
        names = ", ".join(dict.fromkeys(quantizer.spec.name for quantizer in quantizers))
        raise OptionError(
            f"calibration {calibration.config.source}: {names or 'the assignment'} uses none with "
            "these options; leave --calibration out"
        )


def check_rescales(quantizers: Sequence[Quantizer], calibration: CalibrationText) -> None:
    """Raise OptionError if tuning is wanted and no quantizer can rescale packed weights."""
    rescale = any(quantizer.spec.rescales for quantizer in quantizers)
    if calibration.config.tuning is not None and not rescale:
        names = ", ".join(dict.fromkeys(quantizer.spec.name for quantizer in quantizers))
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
