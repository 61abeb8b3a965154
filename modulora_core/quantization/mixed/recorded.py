"""Reads from a checkpoint's record which layer a budget gave which quantizer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from modulora_core.checkpoints.record import PackedSite, QuantizationRecord, Recipe
from modulora_core.registry import Choice


def recorded_allocation(record: QuantizationRecord, kept_bytes: int) -> dict[str, Any] | None:
    """The table of a checkpoint whose quantizers a budget chose.

    Args:
        kept_bytes: the size of all tensors that are not packed.

    Returns:
        None if no budget chose, or if the record's entry does not fit these weights. Else
        ``budget``, ``kept_bytes``, ``ends_bytes``, ``packed_bytes`` and ``measured_on``. Each of
        ``choices`` has ``name``, ``quantizer``, ``options``, ``layers``, ``weights``, ``bytes``.
        ``layers`` are parameter → ``choice`` (an index), ``weights``, ``bytes``. ``ends`` are
        parameter → ``name``, ``quantizer``, ``options``, ``weights``, ``bytes``.
    """
    if record.allocation is None:
        return None
    try:
        return _table(record, record.allocation, kept_bytes)
    except (KeyError, TypeError, ValueError):  # a reader may ignore where a checkpoint comes from
        return None


def _table(record: QuantizationRecord, entry: Mapping[str, Any], kept_bytes: int) -> dict[str, Any]:
    offered = [Recipe(**choice) for choice in entry["choices"]]
    names = _short_names([*offered, *record.recipes])
    layers: dict[str, dict[str, Any]] = {}
    ends: dict[str, dict[str, Any]] = {}
    for name, site in record.items():
        recipe = record.recipes[site.recipe]
        if name in entry.get("ends", {}):
            ends[name] = _described(names[len(offered) + site.recipe], recipe) | _size(site)
        else:
            layers[name] = {"choice": offered.index(recipe), **_size(site)}
    choices = []
    for index, recipe in enumerate(offered):
        own = [layer for layer in layers.values() if layer["choice"] == index]
        sums = {key: _sum(own, key) for key in ("weights", "bytes")}
        choices.append(_described(names[index], recipe) | {"layers": len(own)} | sums)
    return {
        "budget": int(entry["budget"]),
        "kept_bytes": kept_bytes,
        "ends_bytes": _sum(ends.values(), "bytes"),
        "packed_bytes": _sum(layers.values(), "bytes"),
        "measured_on": entry["measured_on"],
        "choices": choices,
        "layers": layers,
        "ends": ends,
    }


def _described(name: str, recipe: Recipe) -> dict[str, Any]:
    return {"name": name, "quantizer": recipe.quantizer, "options": dict(recipe.options)}


def _size(site: PackedSite) -> dict[str, int]:
    return {"weights": site.numel, "bytes": site.nbytes}


def _sum(rows: Iterable[Mapping[str, Any]], key: str) -> int:
    return sum(row[key] for row in rows)


def _short_names(recipes: Sequence[Recipe]) -> list[str]:
    """The label of each recipe, with the options that differ between recipes of one quantizer."""
    names = []
    for recipe in recipes:
        others = [other.options for other in recipes if other.quantizer == recipe.quantizer]
        differing = {
            key: value
            for key, value in recipe.options.items()
            if any(other.get(key) != value for other in others)
        }
        names.append(Choice(recipe.quantizer, differing).label)
    return names
