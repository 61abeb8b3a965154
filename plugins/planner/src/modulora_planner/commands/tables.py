"""Show which layers an assignment packs with which choice."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import groupby
from typing import TYPE_CHECKING, Any

from modulora_core.cli.text import facts, format_size, table

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table


def allocation_tables(allocation: Mapping[str, Any]) -> list[RenderableType]:
    """Make a table of choices, a table of decoder blocks, and a summary.

    Args:
        allocation: the figures (:meth:`modulora_planner.budget.search.Search.solve`).
    """
    choices, layers = _choices(allocation), _layers(allocation["layers"])
    return [choices, "", layers, "", _summary(allocation)]


def _choices(allocation: Mapping[str, Any]) -> Table:
    """Make a row for each choice, and one for a packed head and embedding."""
    rows = []
    for number, choice in enumerate(allocation["choices"], 1):
        uniform = format_size(choice["uniform_bytes"])
        errors = [f"{choice['error']:.4f}", uniform, f"{choice['uniform_error']:.4f}"]
        name, layers = choice["name"], str(choice["layers"])
        rows.append([str(number), name, layers, *_sizes(choice), *errors])
    for name, end in allocation["ends"].items():
        rows.append(["", end["name"], name.removesuffix(".weight"), *_sizes(end)])
    headings = ("", "choice", "layers", "weights", "size", "bits", "error")
    return table((*headings, "everywhere: size", "error"), rows)


def _sizes(row: Mapping[str, Any]) -> tuple[str, str, str]:
    bits = f"{8 * row['bytes'] / row['weights']:.2f}" if row["weights"] else ""
    return f"{row['weights']:,}", format_size(row["bytes"]), bits


def _layers(layers: Mapping[str, Mapping[str, Any]]) -> Table:
    """Make a row for consecutive equal blocks: the number of each layer's choice."""
    blocks: dict[str, dict[str, str]] = {}
    for name in sorted(layers, key=lambda name: _place(_split(name)[0])):
        path, layer = _split(name)
        blocks.setdefault(path, {})[layer] = str(layers[name]["choice"] + 1)
    columns = list(dict.fromkeys(layer for block in blocks.values() for layer in block))
    rows = []
    for block, equal in groupby(blocks.items(), key=lambda item: item[1]):
        (first, _), *others = equal
        last = f" to {others[-1][0].rpartition('.')[2]}" if others else ""
        rows.append([first + last, *(block.get(column, "") for column in columns)])
    return table(("block", *(column.rpartition(".")[2] for column in columns)), rows)


def _split(name: str) -> tuple[str, str]:
    """Split a parameter's name after its first number: the block's path, the layer's."""
    parts = name.removesuffix(".weight").split(".")
    place = next((i for i, part in enumerate(parts) if part.isdigit()), 0)
    return ".".join(parts[: place + 1]), ".".join(parts[place + 1 :])


def _place(path: str) -> tuple[str, int]:
    """Sort block 10 after block 9, though config.json sorts them as text."""
    before, _, number = path.rpartition(".")
    return (before, int(number)) if number.isdigit() else (path, -1)


def _summary(allocation: Mapping[str, Any]) -> Table:
    parts = {
        "packed_layers_bytes": allocation["packed_bytes"],
        "head_and_embedding_bytes": allocation["ends_bytes"],
        "dense_bytes": allocation["kept_bytes"],
    }
    found = {"budget_bytes": allocation["budget"], "used_bytes": sum(parts.values()), **parts}
    layers = allocation["layers"].values()
    best = sum(min(layer["errors"]) for layer in layers) * (1 + 1e-9)
    found["estimated_growth_of_the_loss"] = allocation["error"]
    found["lower_bound_of_the_growth"] = allocation["bound"]
    if allocation["error"] <= best:
        found["note"] = "the budget is more than enough: every layer has its best choice"
    return facts(found)
