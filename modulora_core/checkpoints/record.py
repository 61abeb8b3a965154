"""What a checkpoint's config.json says about its packed weights (docs/checkpoint-format.md specifies it).

A :class:`QuantizationRecord` is the ``quantization_config`` of a normal Hugging Face folder. It names every packed
parameter, and says once for each kind of layer which quantizer packed it and how its tensors look; so a reader knows
dtypes, shapes and bytes from config.json alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from modulora_core import registry
from modulora_core.errors import CheckpointError
from modulora_core.spec import PackedLayout, Quantizer, TensorLayout

QUANT_METHOD = "modulora"
FORMAT = 1

Kind = Literal["linear", "conv1d", "experts", "embedding"]


@dataclass(frozen=True, slots=True)
class Recipe:
    """A quantizer with its options, and the distribution that it came from."""

    quantizer: str
    options: Mapping[str, Any]
    distribution: str
    version: str
    protocol: int

    @classmethod
    def of(cls, quantizer: Quantizer) -> Recipe:
        entry = registry.find(quantizer.spec.name)
        options = quantizer.options.model_dump(mode="json")
        return cls(entry.name, options, entry.distribution, entry.version, quantizer.spec.protocol)

    def create(self) -> Quantizer:
        """The quantizer, from the plugin that is installed here. Raises PluginError with what to install."""
        return registry.create(self.quantizer, self.options, distribution=self.distribution)

    def to_json(self) -> dict[str, Any]:
        return {"quantizer": self.quantizer, "options": dict(self.options), "distribution": self.distribution,
                "version": self.version, "protocol": self.protocol}  # fmt: skip


@dataclass(frozen=True, slots=True)
class PackedSite:
    """How one kind of parameter is packed.

    Attributes:
        recipe: index into the record's recipes.
        layout: of the matrix, or of each matrix of a stack of experts.
        kind: what stood there: ``nn.Linear``, GPT-2's ``Conv1D``, a 3-D stack of experts, or the table of the input
            ``nn.Embedding``, ``[vocabulary, hidden]``.
        experts: number of matrices in a stack, else None.
        transposed: the model's code sees each matrix as ``[in, out]``.
    """

    recipe: int
    layout: PackedLayout
    kind: Kind
    experts: int | None = None
    transposed: bool = False

    @property
    def nbytes(self) -> int:
        return self.layout.nbytes * (self.experts or 1)

    @property
    def parameter_shape(self) -> tuple[int, ...]:
        """As the dense model has the parameter: transposed where its code wants it so, stacked for experts."""
        shape = self.layout.shape[::-1] if self.transposed else self.layout.shape
        return shape if self.experts is None else (self.experts, *shape)

    @property
    def weights(self) -> int:
        """Number of logical weights."""
        return math.prod(self.layout.shape) * (self.experts or 1)

    def prefixes(self, parameter: str) -> list[str]:
        """What the names of a matrix's tensors begin with: one matrix, or one for each expert."""
        if self.experts is None:
            return [parameter]
        return [f"{parameter}.{i}" for i in range(self.experts)]

    def tensors(self, parameter: str) -> Iterator[tuple[str, TensorLayout]]:
        """Names and layouts of the stored tensors."""
        for prefix in self.prefixes(parameter):
            for name, tensor in self.layout.tensors.items():
                yield f"{prefix}.{name}", tensor

    def to_json(self) -> dict[str, Any]:
        return {"recipe": self.recipe, "kind": self.kind, "experts": self.experts, "transposed": self.transposed,
                "layout": self.layout.to_json()}  # fmt: skip


@dataclass(frozen=True, slots=True)
class QuantizationRecord:
    """The ``quantization_config`` of a checkpoint.

    Attributes:
        recipes: each quantizer with its options, once.
        sites: each kind of packed parameter, once.
        weights: the name of each packed parameter in the model (``model.layers.0.mlp.up_proj.weight``) → index
            into ``sites``.
        kept: what was not quantized: reason → names.
        source: the model it was made from.
        seed: of the run that made it.
        calibration: the text that it was calibrated with
            (:meth:`modulora_core.calibration.text.CalibrationText.to_json`), if it was.
        allocation: how the quantizers were chosen layer by layer
            (:meth:`modulora_core.quantization.mixed.candidates.Candidates.to_json`), if a budget did.
    """

    recipes: tuple[Recipe, ...]
    sites: tuple[PackedSite, ...]
    weights: Mapping[str, int]
    kept: Mapping[str, list[str]] = field(default_factory=dict)
    source: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0
    core_version: str = ""
    calibration: Mapping[str, Any] | None = None
    allocation: Mapping[str, Any] | None = None

    def items(self) -> Iterator[tuple[str, PackedSite]]:
        """Each packed parameter with its site."""
        for name, index in self.weights.items():
            yield name, self.sites[index]

    @property
    def nbytes(self) -> int:
        """Bytes of all packed tensors."""
        return sum(site.nbytes for _, site in self.items())

    @property
    def bits_per_weight(self) -> float:
        """Over all packed parameters, everything counted."""
        return 8 * self.nbytes / max(1, sum(site.weights for _, site in self.items()))

    def to_json(self) -> dict[str, Any]:
        return {
            "quant_method": QUANT_METHOD,
            "format": FORMAT,
            "core_version": self.core_version,
            "seed": self.seed,
            "source": dict(self.source),
            "calibration": None if self.calibration is None else dict(self.calibration),
            "recipes": [recipe.to_json() for recipe in self.recipes],
            "sites": [site.to_json() for site in self.sites],
            "weights": dict(self.weights),
            "kept": {reason: list(names) for reason, names in self.kept.items()},
            **({} if self.allocation is None else {"allocation": dict(self.allocation)}),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> QuantizationRecord:
        """Read a ``quantization_config``.

        Raises:
            CheckpointError: it is another method's, another format's, or malformed; the message says which.
        """
        if data.get("quant_method") != QUANT_METHOD:
            raise CheckpointError(
                f"quantization_config: expected quant_method {QUANT_METHOD!r}, got {data.get('quant_method')!r}"
            )
        if data.get("format") != FORMAT:
            raise CheckpointError(f"checkpoint format: this version of modulora-core reads {FORMAT}, got {data.get('format')!r} "
                                  f"(written by modulora-core {data.get('core_version', '?')}); install one that fits")  # fmt: skip
        try:
            recipes = tuple(Recipe(r["quantizer"], dict(r["options"]), r["distribution"], r["version"], int(r["protocol"]))
                            for r in data["recipes"])  # fmt: skip
            sites = tuple(_site_from_json(site, len(recipes)) for site in data["sites"])
            weights = {str(name): int(index) for name, index in data["weights"].items()}
            kept = {
                str(reason): [str(n) for n in names]
                for reason, names in data.get("kept", {}).items()
            }
            calibration = None if data.get("calibration") is None else dict(data["calibration"])
            allocation = None if data.get("allocation") is None else dict(data["allocation"])
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(f"quantization_config: malformed ({type(error).__name__}: {error}); docs/checkpoint-format.md "
                                  "says what it holds") from None  # fmt: skip
        for name, index in weights.items():
            if not 0 <= index < len(sites):
                raise CheckpointError(
                    f"quantization_config: {name} is of site {index}, expected 0 to {len(sites) - 1}"
                )
        return cls(recipes, sites, weights, kept, dict(data.get("source", {})), int(data.get("seed", 0)),
                   str(data.get("core_version", "")), calibration, allocation)  # fmt: skip


def _site_from_json(data: Mapping[str, Any], recipes: int) -> PackedSite:
    kind, recipe, experts = data["kind"], int(data["recipe"]), data["experts"]
    if kind not in get_args(Kind):
        raise CheckpointError(
            f"quantization_config: expected a kind of {', '.join(get_args(Kind))}, got {kind!r}"
        )
    if not 0 <= recipe < recipes:
        raise CheckpointError(
            f"quantization_config: a site is of recipe {recipe}, expected 0 to {recipes - 1}"
        )
    layout = PackedLayout.from_json(data["layout"])
    return PackedSite(
        recipe, layout, kind, None if experts is None else int(experts), bool(data["transposed"])
    )
