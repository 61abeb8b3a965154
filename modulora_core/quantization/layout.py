"""What quantizing a model will write, decided before any weight is read.

Every parameter is packed by one quantizer or kept; every tensor's dtype, shape and place in the files follows.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import modulora_core
from modulora_core import registry
from modulora_core.calibration import CalibrationText, find_blocks
from modulora_core.checkpoints.record import PackedSite, QuantizationRecord, Recipe
from modulora_core.checkpoints.shards import MAX_SHARD_BYTES, Shard, plan_shards
from modulora_core.errors import OptionError, ShapeError
from modulora_core.models import ModelSource
from modulora_core.models.ends import End, find_ends
from modulora_core.models.sites import LinearSite, find_sites, tied_to
from modulora_core.registry import Choice
from modulora_core.spec import PackedLayout, Quantizer, TensorLayout


@dataclass(frozen=True, slots=True)
class Override:
    """Another quantizer for the modules that match ``pattern`` (fnmatch on the dotted module path)."""

    pattern: str
    quantizer: str
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Plan:
    """All that is known before work: the record, a quantizer for each packed parameter, and the files.

    Attributes:
        linears: the parameters that are packed.
        calibration: the samples; None where no quantizer sees any.
    """

    record: QuantizationRecord
    quantizers: tuple[Quantizer, ...]
    shards: tuple[Shard, ...]
    linears: tuple[LinearSite, ...]
    calibration: CalibrationText | None

    def quantizer(self, site: PackedSite) -> Quantizer:
        return self.quantizers[site.recipe]

    @property
    def nbytes(self) -> int:
        return sum(shard.nbytes for shard in self.shards)


def plan_quantization(
    source: ModelSource,
    quantizer: str,
    options: Mapping[str, Any] | None = None,
    *,
    overrides: Sequence[Override] = (),
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    head: Choice | None = None,
    embeddings: Choice | None = None,
    calibration: CalibrationText | None = None,
    seed: int = 0,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> Plan:
    """Decide for every parameter how it is stored. Reads no weight.

    ``include``, ``exclude`` and ``overrides`` are for the linear layers; an end that ``head`` or ``embeddings`` names is packed by that.

    Raises:
        PluginError, OptionError: a quantizer or an option of it can't be used; a pattern matches nothing; nothing is left to pack; a
            quantizer needs calibration and there is none, or there is and none wants it; tuning is wanted and no quantizer's packed
            weights can be rescaled; an end can't be packed (:func:`modulora_core.models.ends.find_ends`), or its quantizer needs calibration.
        ShapeError: a quantizer can't take a layer's shape; the message names the layer.
        ModelError: calibration is wanted and the model has no decoder blocks.
    """
    choices = [
        registry.create(quantizer, options),
        *(registry.create(o.quantizer, o.options) for o in overrides),
    ]
    _check_calibration(choices, calibration)
    found = find_sites(source.skeleton(), include=include, exclude=exclude)
    _check_patterns(overrides, found.linears)
    ends = {
        end.site.name: end
        for end in find_ends(source.skeleton(), head, embeddings, source.parameters)
    }
    linears = [linear for linear in found.linears if linear.name not in ends]
    kept = {name: reason for name, reason in found.kept.items() if name not in ends}
    if calibration is not None:
        unseen = _out_of_sight(source, linears, choices, overrides)
        _refuse_named(unseen, include)
        kept |= {
            linear.name: "outside of the decoder blocks, where nothing is calibrated"
            for linear in unseen
        }
        linears = [linear for linear in linears if linear not in unseen]
    if not (linears or ends):
        raise OptionError(_nothing_to_pack(source, kept))
    of_ends = {name: choice_of_end(end, choices) for name, end in ends.items()}
    return plan_choices(
        source, choices, [*linears, *(end.site for end in ends.values())], kept,
        lambda linear: of_ends[linear.name] if linear.name in of_ends else _choose(linear, overrides),
        calibration=calibration, seed=seed, max_shard_bytes=max_shard_bytes,
    )  # fmt: skip


def _nothing_to_pack(source: ModelSource, kept: Mapping[str, str]) -> str:
    stays = "; ".join(f"{reason}: {len(names)}" for reason, names in _by_reason(kept).items())
    return (f"quantize {source.location.model}: expected one weight or more to pack, all stay as they are ({stays}); leave out fewer "
            "with --include and --exclude, or name a quantizer for an end with --quantize-head or --quantize-embeddings")  # fmt: skip


def choice_of_end(end: End, choices: list[Quantizer]) -> int:
    """Index of the quantizer of an end among ``choices``, to which it is added where it isn't there.

    Raises:
        PluginError, OptionError: the quantizer or an option of it can't be used, or it needs calibration.
    """
    quantizer = end.choice.create()
    if quantizer.spec.calibration == "required":
        raise OptionError(
            f"--{end.option} {quantizer.spec.name}: it needs calibration, and nothing is calibrated outside of the decoder blocks; "
            "choose a quantizer that needs none"
        )
    for index, other in enumerate(choices):
        if (other.spec.name, other.options) == (quantizer.spec.name, quantizer.options):
            return index
    choices.append(quantizer)
    return len(choices) - 1


def plan_choices(
    source: ModelSource,
    choices: Sequence[Quantizer],
    linears: Sequence[LinearSite],
    kept: Mapping[str, str],
    chosen: Callable[[LinearSite], int],
    *,
    calibration: CalibrationText | None,
    seed: int,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    allocation: Mapping[str, Any] | None = None,
) -> Plan:
    """The plan in which every one of ``linears`` is packed by ``choices[chosen(linear)]``, and all else is kept.

    Args:
        kept: name → reason of every other parameter. What is tied to a packed one is packed with it, and isn't recorded.
        allocation: how the choices came about, for the record.

    Raises:
        ShapeError: a quantizer can't take a layer's shape; the message names the layer.
    """
    recipes = tuple(Recipe.of(choice) for choice in choices)
    sites, weights = packed_sites(linears, choices, chosen)
    packed_too = {tied_to(name) for name in weights}
    stays = {name: reason for name, reason in kept.items() if reason not in packed_too}
    record = QuantizationRecord(
        recipes, sites, weights, _by_reason(stays), source.identity(), seed, modulora_core.__version__,
        None if calibration is None else calibration.to_json(), allocation,
    )  # fmt: skip
    tensors = dict(_stored_tensors(source, record))
    shards = tuple(plan_shards(tensors, max_shard_bytes))
    return Plan(record, tuple(choices), shards, tuple(linears), calibration)


def packed_sites(
    linears: Sequence[LinearSite], choices: Sequence[Quantizer], chosen: Callable[[LinearSite], int]
) -> tuple[tuple[PackedSite, ...], dict[str, int]]:
    """Each kind of packed parameter once, and the kind of every parameter."""
    layouts: dict[tuple[int, tuple[int, int]], PackedLayout] = {}
    sites: list[PackedSite] = []
    weights: dict[str, int] = {}
    for linear in linears:
        recipe = chosen(linear)
        shape = (linear.out_features, linear.in_features)
        if (recipe, shape) not in layouts:
            layouts[recipe, shape] = layout_of(choices[recipe], shape, linear)
        site = PackedSite(
            recipe, layouts[recipe, shape], linear.kind, linear.experts, linear.transposed
        )
        if site not in sites:
            sites.append(site)
        weights[linear.name] = sites.index(site)
    return tuple(sites), weights


def _check_calibration(choices: Sequence[Quantizer], calibration: CalibrationText | None) -> None:
    wanted = {choice.spec.calibration for choice in choices}
    for choice in choices:
        if choice.spec.calibration == "required" and calibration is None:
            raise OptionError(f"{choice.spec.name}: expected a calibration text, got none; give one: --calibration SOURCE, "
                              "such as a .txt file, or pydoc")  # fmt: skip
    if calibration is None:
        return
    check_rescales(choices, calibration)
    if calibration.config.tuning is None and wanted == {"none"}:
        raise OptionError(
            f"calibration {calibration.config.source}: {_names(choices)} uses none; leave --calibration out"
        )


def check_rescales(choices: Sequence[Quantizer], calibration: CalibrationText) -> None:
    """Raises OptionError where tuning is wanted and none of ``choices`` packs weights that can be rescaled."""
    if calibration.config.tuning is not None and not any(
        choice.spec.rescales for choice in choices
    ):
        raise OptionError(
            f"tuning: expected a quantizer whose packed weights can be rescaled, got {_names(choices)}; leave --tune-epochs out"
        )


def _names(choices: Sequence[Quantizer]) -> str:
    return ", ".join(dict.fromkeys(choice.spec.name for choice in choices))


def _out_of_sight(
    source: ModelSource,
    linears: Sequence[LinearSite],
    choices: Sequence[Quantizer],
    overrides: Sequence[Override],
) -> list[LinearSite]:
    """What needs calibration and is outside of the decoder blocks, as an untied output head is."""
    blocks = tuple(f"{path}." for path in find_blocks(source.skeleton()))
    return [
        linear
        for linear in linears
        if choices[_choose(linear, overrides)].spec.calibration == "required"
        and not linear.name.startswith(blocks)
    ]


def _refuse_named(unseen: Sequence[LinearSite], include: Sequence[str]) -> None:
    for linear in unseen:
        for pattern in include:
            if any(fnmatch.fnmatchcase(name, pattern) for name in (linear.module, linear.name)):
                raise OptionError(
                    f"--include {pattern}: {linear.module} is outside of the decoder blocks, where nothing is calibrated; choose a "
                    f"quantizer that needs no calibration for it: --override '{linear.module}=NAME'"
                )


def _check_patterns(overrides: Sequence[Override], linears: Sequence[LinearSite]) -> None:
    for override in overrides:
        if not any(fnmatch.fnmatchcase(linear.module, override.pattern) for linear in linears):
            raise OptionError(f"override {override.pattern!r}: matches none of the {len(linears)} linear layers, "
                              f"such as {linears[0].module if linears else '(none)'}")  # fmt: skip


def _choose(linear: LinearSite, overrides: Sequence[Override]) -> int:
    """Index of the recipe: the last override that matches, else 0."""
    matching = [
        i for i, o in enumerate(overrides, 1) if fnmatch.fnmatchcase(linear.module, o.pattern)
    ]
    return matching[-1] if matching else 0


def layout_of(quantizer: Quantizer, shape: tuple[int, int], linear: LinearSite) -> PackedLayout:
    """How ``quantizer`` packs a matrix of ``linear``. Raises ShapeError, naming the layer, where it can't."""
    try:
        quantizer.check_shape(shape)
    except ShapeError as error:
        raise ShapeError(
            f"{error} ({linear.module}); leave it out with --exclude or choose another quantizer"
        ) from None
    return quantizer.layout(shape)


def _by_reason(kept: Mapping[str, str]) -> dict[str, list[str]]:
    reasons: dict[str, list[str]] = {}
    for name, reason in kept.items():
        reasons.setdefault(reason, []).append(name)
    return reasons


def _stored_tensors(
    source: ModelSource, record: QuantizationRecord
) -> Iterator[tuple[str, TensorLayout]]:
    for name, info in source.parameters.items():
        if name in record.weights:
            yield from record.sites[record.weights[name]].tensors(name)
        else:
            yield name, TensorLayout(str(info.dtype).removeprefix("torch."), tuple(info.shape))
