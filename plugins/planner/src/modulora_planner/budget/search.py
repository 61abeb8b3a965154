"""Chooses among a budget's quantizers for each layer of a model, given sizes and errors."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from modulora_core.calibration import CalibrationText, block_prefixes
from modulora_core.checkpoints.record import Recipe, packed_sites
from modulora_core.errors import DataError, OptionError
from modulora_core.models import ModelSource
from modulora_core.models.ends import End, find_ends
from modulora_core.models.sites import LinearSite, find_sites
from modulora_core.quantization.assignment import Assignment
from modulora_core.quantization.layout import check_rescales, end_quantizer
from modulora_core.registry import Choice
from modulora_core.spec import Quantizer
from modulora_planner.budget.allocation import Allocation, Offer, allocate

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


@dataclass(frozen=True, slots=True)
class Selection:
    """The parameters to pack.

    Attributes:
        include, exclude: patterns of linear layers, as ``quantize`` has them.
        head, embeddings: quantizers of the ends; None leaves an end dense.
    """

    include: Sequence[str] = ()
    exclude: Sequence[str] = ()
    head: Choice | None = None
    embeddings: Choice | None = None


@dataclass(frozen=True)
class Search:
    """The choices for one model.

    Attributes:
        quantizers: one for each of the budget's choices.
        linears: the layers to choose for, all of them in decoder blocks.
        others: the other linear layers, which stay dense.
        sizes: by layer, its packed bytes under each choice.
        ends: the packed head and embedding; ends_bytes: the packed size of each.
        dense_bytes: the size of all dense parameters.
        calibration: the samples; seed: the seed for random numbers of quantizers.
    """

    source: ModelSource
    budget: Budget
    selection: Selection
    quantizers: Sequence[Quantizer]
    linears: Sequence[LinearSite]
    others: Sequence[LinearSite]
    sizes: Mapping[str, Sequence[int]]
    ends: Sequence[End]
    ends_bytes: Mapping[str, int]
    dense_bytes: int
    calibration: CalibrationText
    seed: int

    @property
    def fixed_bytes(self) -> int:
        """The size of everything that is not chosen for."""
        return self.dense_bytes + sum(self.ends_bytes.values())

    @property
    def request(self) -> dict[str, Any]:
        """Identifies a run: equal requests give equal assignments."""
        ends = {end.site.name: Recipe.of(end.choice.create()) for end in self.ends}
        return {
            "source": self.source.identity(),
            "seed": self.seed,
            "weights": [linear.name for linear in self.linears],
            "budget": self.budget.nbytes,
            "choices": [Recipe.of(each).model_dump(mode="json") for each in self.quantizers],
            "ends": {name: recipe.model_dump(mode="json") for name, recipe in ends.items()},
            "measured_on": self.calibration.to_json(),
        }

    def solve(self, errors: Mapping[str, Sequence[float]]) -> tuple[Assignment, dict[str, Any]]:
        """Choose a quantizer for each layer, given its error under each choice.

        Returns:
            the assignment, and its figures as a JSON-able table (:meth:`_table`).
        """
        offers = [list(map(Offer, sizes, errors[name])) for name, sizes in self.sizes.items()]
        found = allocate(offers, self.budget.nbytes - self.fixed_bytes)
        return self._assignment(found), self._table(found, errors)

    def _assignment(self, found: Allocation) -> Assignment:
        """The choice of most layers as the default, and a line for each other layer."""
        (most, _), *_ = Counter(found.taken).most_common(1)
        modules = Counter(linear.module for linear in (*self.linears, *self.others))
        layers: dict[str, Choice | None] = {}
        for linear, taken in (
            *zip(self.linears, found.taken, strict=True),
            *((linear, None) for linear in self.others),
        ):
            # the experts of a layer are several parameters of one module
            name = linear.module if modules[linear.module] == 1 else linear.name
            if taken != most:
                layers[name] = None if taken is None else self.budget.choices[taken]
        return Assignment(
            default=self.budget.choices[most], layers=layers,
            head=self.selection.head, embeddings=self.selection.embeddings,
        )  # fmt: skip

    def _table(self, found: Allocation, errors: Mapping[str, Sequence[float]]) -> dict[str, Any]:
        """The figures of an allocation.

        Returns:
            ``budget``, ``kept_bytes`` of dense tensors, ``ends_bytes``, ``packed_bytes`` of layers
            and ``measured_on``; ``error`` and its lower ``bound``, in nats per token. Each of
            ``layers`` has ``choice`` (an index), ``weights``, ``bytes``, ``error``, and ``errors``
            under each choice. Each of ``choices`` has ``name``, ``quantizer``, ``options``; its
            ``layers`` and their ``weights``, ``bytes``, ``error``; and ``uniform_bytes`` and
            ``uniform_error`` of a checkpoint with this choice everywhere. Each of ``ends`` has
            ``name``, ``quantizer``, ``options``, ``weights``, ``bytes``.
        """
        layers: dict[str, dict[str, Any]] = {}
        for linear, taken in zip(self.linears, found.taken, strict=True):
            of_layer = errors[linear.name]
            layers[linear.name] = {
                "choice": taken, "weights": linear.numel,
                "bytes": self.sizes[linear.name][taken], "error": of_layer[taken],
                "errors": list(of_layer),
            }  # fmt: skip
        choices = []
        for index, (choice, quantizer) in enumerate(
            zip(self.budget.choices, self.quantizers, strict=True)
        ):
            own = [layer for layer in layers.values() if layer["choice"] == index]
            choices.append({
                **_described(choice, quantizer), "layers": len(own),
                **{key: sum(layer[key] for layer in own) for key in ("weights", "bytes", "error")},
                "uniform_bytes": self.fixed_bytes + sum(s[index] for s in self.sizes.values()),
                "uniform_error": math.fsum(layer["errors"][index] for layer in layers.values()),
            })  # fmt: skip
        ends = {
            end.site.name: {
                **_described(end.choice, end.choice.create()), "weights": end.site.numel,
                "bytes": self.ends_bytes[end.site.name],
            }
            for end in self.ends
        }  # fmt: skip
        return {
            "budget": self.budget.nbytes,
            "kept_bytes": self.dense_bytes,
            "ends_bytes": sum(self.ends_bytes.values()),
            "packed_bytes": found.nbytes,
            "error": found.error,
            "bound": found.bound,
            "measured_on": self.calibration.to_json(),
            "choices": choices,
            "layers": layers,
            "ends": ends,
        }


def _described(choice: Choice, quantizer: Quantizer) -> dict[str, Any]:
    options = quantizer.options.model_dump(mode="json")
    return {"name": choice.label, "quantizer": choice.quantizer, "options": options}


def open_search(
    source: ModelSource,
    budget: Budget,
    selection: Selection,
    calibration: CalibrationText,
    *,
    seed: int,
) -> Search:
    """Sort the model's parameters, and compute every layer's size. Reads no weight.

    Raises:
        PluginError, OptionError: a quantizer, an option, a pattern or a combination is refused;
            the budget is too small.
        ShapeError: a quantizer can't take a layer's shape; the message names the layer.
        ModelError: the model has no decoder blocks.
        DataError: there is only one calibration sample.
    """
    if len(calibration.ids) < 2:
        raise DataError(
            "budget: expected at least 2 calibration samples, one of them to judge by, got 1; "
            "give more text or shorter samples (seq_len)"
        )
    quantizers = [choice.create() for choice in budget.choices]
    _check_distinct(budget.choices, quantizers)
    check_rescales(quantizers, calibration)
    ends = find_ends(source.outline, selection.head, selection.embeddings, source.parameters)
    of_ends = {end.site.name: end_quantizer(end) for end in ends}
    found = find_sites(source.outline, include=selection.include, exclude=selection.exclude)
    inside = block_prefixes(source)
    _check_included(found.linears, of_ends, inside, selection.include)
    linears = [each for each in found.linears if each.name.startswith(inside)]
    if not linears:
        raise OptionError(
            "budget: expected linear layers to choose for, got none; leave out --include or "
            "--exclude"
        )
    chosen = {linear.name for linear in linears} | of_ends.keys()
    sizes: dict[str, list[int]] = {linear.name: [] for linear in linears}
    for index in range(len(quantizers)):
        sites, weights = packed_sites(linears, quantizers, dict.fromkeys(sizes, index))
        for name, site in weights.items():
            sizes[name].append(sites[site].nbytes)
    sites, weights = packed_sites(
        [end.site for end in ends], list(of_ends.values()),
        {name: number for number, name in enumerate(of_ends)},
    )  # fmt: skip
    search = Search(
        source, budget, selection, quantizers, linears,
        others=[each for each in find_sites(source.outline).linears if each.name not in chosen],
        sizes=sizes, ends=ends,
        ends_bytes={name: sites[site].nbytes for name, site in weights.items()},
        dense_bytes=sum(source.parameters[n].nbytes for n in source.parameters.keys() - chosen),
        calibration=calibration, seed=seed,
    )  # fmt: skip
    _check_budget(search)
    return search


def _check_included(
    linears: Sequence[LinearSite], ends: Mapping[str, Quantizer], inside: tuple[str, ...],
    include: Sequence[str],
) -> None:  # fmt: skip
    """Raise OptionError if ``include`` names a layer outside of the decoder blocks."""
    for linear in linears:
        for pattern in include:
            named = any(fnmatchcase(name, pattern) for name in (linear.module, linear.name))
            if named and linear.name not in ends and not linear.name.startswith(inside):
                raise OptionError(
                    f"--include {pattern}: {linear.module} is {OUTSIDE}; leave it out"
                )


def _check_distinct(choices: Sequence[Choice], quantizers: Sequence[Quantizer]) -> None:
    if len(choices) < 2:
        raise OptionError(
            f"choices: expected two or more to choose from, got {len(choices)}; for one quantizer "
            "everywhere use `modulora quantize -q NAME`"
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


def _check_budget(search: Search) -> None:
    layers = sum(map(min, search.sizes.values()))
    least, given = search.fixed_bytes + layers, search.budget.nbytes
    ends = ", ".join(f"{end.site.module} by {end.choice.label}" for end in search.ends)
    ends += f" {_mib(sum(search.ends_bytes.values()))}, " if ends else ""
    if given < least:
        raise OptionError(
            f"budget: expected at least {least} bytes ({_mib(least)}), got {given} ({_mib(given)}):"
            f" dense tensors take {_mib(search.dense_bytes)}, "
            f"{ends}and the smallest choice for every layer {_mib(layers)}; give more, or smaller "
            "choices"
        )


def _mib(nbytes: int) -> str:
    return f"{nbytes / 2**20:,.2f} MiB"
