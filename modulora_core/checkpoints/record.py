"""Record in config.json which quantizer packed which parameter, and how
(docs/reference/checkpoint-format.md).

A :class:`QuantizationRecord` is the ``quantization_config`` of an ordinary Hugging Face folder. It
names every packed parameter, and says once for each kind of layer which quantizer packed it and how
its tensors look. A reader knows dtypes, shapes and bytes from config.json alone.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    NonNegativeInt,
    PlainSerializer,
    PositiveInt,
    model_validator,
)

from modulora_core import registry
from modulora_core.checkpoints.joined_rows import JoinedRows, layouts_of_parts
from modulora_core.errors import CheckpointError, ShapeError
from modulora_core.models.json_files import check_json
from modulora_core.models.sites import Kind, LinearSite
from modulora_core.spec import PackedLayout, Quantizer, TensorLayout
from modulora_core.version import VERSION

if TYPE_CHECKING:
    from torch import Tensor

QUANT_METHOD: Literal["modulora"] = "modulora"
FORMAT: Literal[1] = 1
GUARD = TensorLayout("uint8", (0,))
"""The layout of a checkpoint's guard, :attr:`QuantizationRecord.guard`."""

_StoredLayout = Annotated[
    PackedLayout,
    BeforeValidator(lambda data: PackedLayout.from_json(data) if isinstance(data, dict) else data),
    PlainSerializer(PackedLayout.to_json),
]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True)


class Recipe(_Frozen):
    """A quantizer with its options, and the distribution that it came from."""

    quantizer: str
    options: Mapping[str, Any]
    distribution: str
    version: str
    protocol: int

    @classmethod
    def of(cls, quantizer: Quantizer) -> Recipe:
        name, protocol = quantizer.spec.name, quantizer.spec.protocol
        if isinstance(quantizer, JoinedRows):
            parts = [cls.of(part).model_dump(mode="json") for part in quantizer.parts]
            return cls(quantizer=name, options={"parts": parts}, distribution="modulora-core",
                       version=VERSION, protocol=protocol)  # fmt: skip
        entry, options = registry.find(name), quantizer.options.model_dump(mode="json")
        return cls(quantizer=name, options=options, distribution=entry.distribution,
                   version=entry.version, protocol=protocol)  # fmt: skip

    @property
    def parts(self) -> list[Recipe]:
        """The recipes of plugins: of each part of joined rows, else this one."""
        if self.quantizer != JoinedRows.spec.name:
            return [self]
        return [Recipe.model_validate(part) for part in self.options["parts"]]

    @model_validator(mode="after")
    def _check_parts(self) -> Self:
        if self.quantizer == JoinedRows.spec.name and not (
            isinstance(parts := self.options.get("parts"), list)
            and all(part.quantizer != self.quantizer for part in map(Recipe.model_validate, parts))
        ):
            raise ValueError(f"expected recipes of plugins as parts, got {parts!r:.80}")
        return self

    def create(self) -> Quantizer:
        """The quantizer of the installed plugin. Raises PluginError, with what to install."""
        if self.quantizer == JoinedRows.spec.name:
            return JoinedRows([part.create() for part in self.parts])
        return registry.create(self.quantizer, self.options, distribution=self.distribution)


class PackedSite(_Frozen):
    """How one kind of parameter is packed."""

    recipe: NonNegativeInt
    """An index into the record's recipes."""
    kind: Kind
    """The parameter's place in the model. ``"embedding"`` is the input table, ``[vocabulary,
    hidden]``.
    """
    experts: PositiveInt | None = None
    """The number of matrices in a stack of experts, else None."""
    transposed: bool = False
    """Whether the model's code sees each matrix as ``[in, out]``."""
    layout: _StoredLayout
    """The layout of the matrix, or of each matrix of a stack."""

    @model_validator(mode="after")
    def _check_experts(self) -> Self:
        if (self.kind == "experts") != (self.experts is not None):
            raise ValueError(f"expected experts for the kind experts, got kind {self.kind}")
        return self

    @classmethod
    def of(cls, linear: LinearSite, recipe: int, layout: PackedLayout) -> PackedSite:
        return cls(recipe=recipe, kind=linear.kind, experts=linear.experts,
                   transposed=linear.transposed, layout=layout)  # fmt: skip

    @property
    def nbytes(self) -> int:
        return self.layout.nbytes * (self.experts or 1)

    @property
    def parameter_shape(self) -> tuple[int, ...]:
        """The shape of the parameter in the dense model: maybe transposed, stacked for experts."""
        shape = self.layout.shape[::-1] if self.transposed else self.layout.shape
        return shape if self.experts is None else (self.experts, *shape)

    @property
    def numel(self) -> int:
        """The number of logical weights."""
        return math.prod(self.layout.shape) * (self.experts or 1)

    def prefixes(self, parameter: str) -> Iterator[str]:
        """The prefix of each matrix's tensor names: one matrix, or one for each expert.

        A damaged record may claim any number of experts, so no list of them is made.
        """
        if self.experts is None:
            yield parameter
        else:
            yield from (f"{parameter}.{i}" for i in range(self.experts))

    def matrices(self, parameter: Tensor) -> list[Tensor]:
        """The matrices of a dense parameter, each ``[out, in]``."""
        stack = [parameter] if self.experts is None else list(parameter)
        return [matrix.t() if self.transposed else matrix for matrix in stack]

    def tensors(self, parameter: str) -> Iterator[tuple[str, TensorLayout]]:
        """Names and layouts of the stored tensors."""
        for prefix in self.prefixes(parameter):
            for name, tensor in self.layout.tensors.items():
                yield f"{prefix}.{name}", tensor


class QuantizationRecord(_Frozen):
    """The ``quantization_config`` of a checkpoint."""

    quant_method: Literal["modulora"] = QUANT_METHOD
    format: Literal[1] = FORMAT
    core_version: str = ""
    seed: int = 0
    """The seed of the run that made it."""
    source: Mapping[str, Any] = {}
    """The model that it was made from."""
    contents: str | None = None
    """The SHA-256 of that model's values; None in a checkpoint that was not quantized from one, or
    by an older version.
    """
    calibration: Mapping[str, Any] | None = None
    """The text of its calibration (:meth:`modulora_core.calibration.CalibrationText.to_json`)."""
    recipes: tuple[Recipe, ...]
    """Each quantizer with its options, once."""
    sites: tuple[PackedSite, ...]
    """Each kind of packed parameter, once."""
    weights: Mapping[str, NonNegativeInt]
    """The name of each packed parameter in the model → an index into ``sites``."""
    kept: Mapping[str, list[str]] = {}
    """The parameters that stay dense: reason → names."""

    def site(self, parameter: str) -> PackedSite:
        """How a packed parameter is packed."""
        return self.sites[self.weights[parameter]]

    def items(self) -> Iterator[tuple[str, PackedSite]]:
        """Each packed parameter with its site."""
        for name, index in self.weights.items():
            yield name, self.sites[index]

    def quantizers(self) -> list[dict[str, Any]]:
        """The fields of each plugin's recipe, and the ``parameters``, ``weights`` and ``bytes``
        that it packed; a parameter of joined rows counts for each part."""
        nothing = {"parameters": 0, "weights": 0, "bytes": 0}
        plain = [part for recipe in self.recipes for part in recipe.parts]
        found = {part.model_dump_json(): {**part.model_dump(), **nothing} for part in plain}
        for _, site in self.items():
            layouts = layouts_of_parts(site.layout)
            for recipe, part in zip(self.recipes[site.recipe].parts, layouts, strict=True):
                group = found[recipe.model_dump_json()]
                group["parameters"] += 1
                group["weights"] += math.prod(part.shape) * (site.experts or 1)
                group["bytes"] += part.nbytes * (site.experts or 1)
        return list(found.values())

    @property
    def base(self) -> str:
        """The base model's name in the class that was packed, such as ``"model."``; or ``""``.

        The names of all parameters of decoder blocks begin with it.
        """
        blocks = (re.match(r"([^.]+\.)(.+\.)?\d+\.", name) for name in self.weights)
        return next((block[1] for block in blocks if block), "")

    @property
    def guard(self) -> dict[str, TensorLayout]:
        """Tensors without values in the places of all packed parameters.

        A program that does not know this format would skip it and fill packed parameters with
        random numbers. The guard's shape makes transformers stop with an error. Classes call the
        base model by different names, so each parameter is also guarded without that name.
        """
        names = dict.fromkeys((*self.weights, *(n.removeprefix(self.base) for n in self.weights)))
        return dict.fromkeys(names, GUARD)

    @property
    def nbytes(self) -> int:
        """Bytes of all packed tensors."""
        return sum(site.nbytes for _, site in self.items())

    @property
    def bits_per_weight(self) -> float:
        """The mean over all packed parameters, scales included."""
        return 8 * self.nbytes / max(1, sum(site.numel for _, site in self.items()))

    def to_json(self) -> dict[str, Any]:
        return self.model_dump(exclude={"contents"} if self.contents is None else None, mode="json")

    @classmethod
    def from_json(
        cls, data: Mapping[str, Any], place: str | Path = "config.json"
    ) -> QuantizationRecord:
        """Read a ``quantization_config``; messages begin with its place. Raises CheckpointError."""
        if data.get("format") != FORMAT:
            raise CheckpointError(
                f"{place}: checkpoint format: this version of modulora-core reads {FORMAT}, got "
                f"{data.get('format')!r}, written by modulora-core "
                f"{data.get('core_version', '?')}; install another version"
            )
        try:
            return check_json(data, cls, "malformed quantization_config")
        except CheckpointError as error:  # of a layout, which doesn't know the place
            raise CheckpointError(f"{place}: {error}") from None

    @model_validator(mode="after")
    def _check_indices(self) -> Self:
        for index, count, what in (
            *((site.recipe, len(self.recipes), "recipe") for site in self.sites),
            *((index, len(self.sites), "site") for index in self.weights.values()),
        ):
            if index >= count:
                raise ValueError(f"expected a {what} 0 to {count - 1}, got {what} {index}")
        return self


def distinct_sites(
    packed: Iterable[tuple[LinearSite, int, PackedLayout]],
) -> tuple[tuple[PackedSite, ...], dict[str, int]]:
    """A record's sites and weights: each kind of packed parameter once, and the kind of each.

    Args:
        packed: each parameter with the index of its recipe and its layout.
    """
    sites: list[PackedSite] = []
    weights: dict[str, int] = {}
    for linear, recipe, layout in packed:
        site = PackedSite.of(linear, recipe, layout)
        if site not in sites:
            sites.append(site)
        weights[linear.name] = sites.index(site)
    return tuple(sites), weights


def packed_sites(
    linears: Sequence[LinearSite], quantizers: Sequence[Quantizer], chosen: Mapping[str, int]
) -> tuple[tuple[PackedSite, ...], dict[str, int]]:
    """Each kind of packed parameter once, and by name the kind of every parameter.

    Args:
        chosen: by name, the index of a parameter's quantizer.

    Raises ShapeError: a quantizer can't take a layer's shape; the message names the layer.
    """
    layouts: dict[tuple[int, tuple[int, int]], PackedLayout] = {}
    packed = []
    for linear in linears:
        recipe, shape = chosen[linear.name], (linear.out_features, linear.in_features)
        if (recipe, shape) not in layouts:
            layouts[recipe, shape] = _layout_of(quantizers[recipe], shape, linear)
        packed.append((linear, recipe, layouts[recipe, shape]))
    return distinct_sites(packed)


def _layout_of(quantizer: Quantizer, shape: tuple[int, int], linear: LinearSite) -> PackedLayout:
    try:
        quantizer.check_shape(shape)
    except ShapeError as error:
        raise ShapeError(
            f"{error} ({linear.module}); leave it out with --exclude or choose another quantizer"
        ) from None
    return quantizer.layout(shape)


def by_reason(kept: Mapping[str, str]) -> dict[str, list[str]]:
    """Turn name → reason into reason → names, as a record has them."""
    reasons: dict[str, list[str]] = {}
    for name, reason in kept.items():
        reasons.setdefault(reason, []).append(name)
    return reasons
