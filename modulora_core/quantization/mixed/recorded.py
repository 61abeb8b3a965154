"""What went where in a mixed checkpoint, as far as its record tells: all but the errors, which only the run knows."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from modulora_core.checkpoints.record import PackedSite, QuantizationRecord, Recipe
from modulora_core.registry import Choice


def recorded_allocation(record: QuantizationRecord, kept_bytes: int) -> dict[str, Any] | None:
    """The table of a checkpoint whose quantizers a budget chose.

    Args:
        kept_bytes: of the tensors that aren't packed.

    Returns:
        ``budget``; ``kept_bytes``, ``ends_bytes`` of a packed head and embedding, ``packed_bytes`` of all layers; ``measured_on``: the
        text; ``choices``: ``name``, ``quantizer``, ``options``, and ``layers``, ``weights``, ``bytes`` of what each got; ``layers``:
        parameter → ``choice`` (an index), ``weights``, ``bytes``; ``ends``: parameter → ``name``, ``quantizer``, ``options``, ``weights``,
        ``bytes``. None if no budget chose, or if what is recorded of it isn't of these weights: a reader may ignore provenance.
    """
    if record.allocation is None:
        return None
    try:
        return _table(record, record.allocation, kept_bytes)
    except (KeyError, TypeError, ValueError):
        return None


def _table(record: QuantizationRecord, told: Mapping[str, Any], kept_bytes: int) -> dict[str, Any]:
    offered = [Recipe(**choice) for choice in told["choices"]]
    names = _short_names([*offered, *record.recipes])
    layers: dict[str, dict[str, Any]] = {}
    ends: dict[str, dict[str, Any]] = {}
    for name, site in record.items():
        recipe = record.recipes[site.recipe]
        if name in told.get("ends", {}):
            ends[name] = {
                "name": names[len(offered) + site.recipe],
                **_asked(recipe),
                **_size(site),
            }
        else:
            layers[name] = {"choice": offered.index(recipe), **_size(site)}
    choices = [
        {"name": names[index], **_asked(recipe), **_got([own for own in layers.values() if own["choice"] == index])}
        for index, recipe in enumerate(offered)
    ]  # fmt: skip
    return {
        "budget": int(told["budget"]), "kept_bytes": kept_bytes, "ends_bytes": _sum(ends.values(), "bytes"),
        "packed_bytes": _sum(layers.values(), "bytes"), "measured_on": told["measured_on"], "choices": choices, "layers": layers,
        "ends": ends,
    }  # fmt: skip


def _asked(recipe: Recipe) -> dict[str, Any]:
    return {"quantizer": recipe.quantizer, "options": dict(recipe.options)}


def _size(site: PackedSite) -> dict[str, int]:
    return {"weights": site.weights, "bytes": site.nbytes}


def _got(layers: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    return {
        "layers": len(layers),
        "weights": _sum(layers, "weights"),
        "bytes": _sum(layers, "bytes"),
    }


def _sum(rows: Iterable[Mapping[str, Any]], key: str) -> int:
    return sum(row[key] for row in rows)


def _short_names(recipes: Sequence[Recipe]) -> list[str]:
    """Each with those of its options only that tell it from another of ``recipes``: a record has all options, defaults too."""
    names = []
    for recipe in recipes:
        others = [other.options for other in recipes if other.quantizer == recipe.quantizer]
        telling = {
            key: value
            for key, value in recipe.options.items()
            if any(other.get(key) != value for other in others)
        }
        names.append(Choice(recipe.quantizer, telling).label)
    return names
