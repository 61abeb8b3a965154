"""Writes an assignment as YAML that people read and edit: figures are in comments."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

import yaml

from modulora_core.cli.text import format_size
from modulora_core.quantization.assignment import Assignment
from modulora_core.registry import Choice

REQUEST = "# request: "
"""Begins the line with the digest of the request that the file answers."""


def assignment_text(
    assignment: Assignment, table: Mapping[str, Any], model: str, request: str
) -> str:
    """The file's text.

    Args:
        table: the figures (:meth:`modulora_planner.budget.search.Search.solve`).
        model: MODEL; request: the digest of the request.
    """
    return "".join(f"{line}\n" for line in _lines(assignment, table, model, request))


def _lines(
    assignment: Assignment, table: Mapping[str, Any], model: str, request: str
) -> Iterator[str]:
    parts = {
        "layers": table["packed_bytes"], "head and embedding": table["ends_bytes"],
        "dense": table["kept_bytes"],
    }  # fmt: skip
    used = ", ".join(f"{name} {format_size(nbytes)}" for name, nbytes in parts.items())
    yield f"# Which quantizer packs which layers of {json.dumps(model)}; the last match counts."
    yield f"# Budget: {table['budget']:,} bytes. Used: {sum(parts.values()):,} bytes ({used})."
    yield f"# Estimated growth of the loss: {table['error']:.5g} nats per token;"
    yield f"# no assignment within the budget has less than {table['bound']:.5g}."
    yield "#"
    rows = [("choice", "layers", "size", "error", "everywhere: size", "error")]
    rows += [
        (
            choice["name"], str(choice["layers"]), format_size(choice["bytes"]),
            f"{choice['error']:.4f}", format_size(choice["uniform_bytes"]),
            f"{choice['uniform_error']:.4f}",
        )
        for choice in table["choices"]
    ]  # fmt: skip
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        yield "# " + "  ".join(map(str.ljust, row, widths)).rstrip()
    yield f"{REQUEST}{request}"
    yield f"default: {_text(assignment.default)}"
    yield "layers:" if assignment.layers else "layers: {}"
    for name, choice in assignment.layers.items():
        layer = table["layers"].get(name) or table["layers"].get(f"{name}.weight")
        comment = f"  # error {layer['error']:.2g}" if layer else ""
        yield f"  {json.dumps(name)}: {_text(choice)}{comment}"
    for key in ("head", "embeddings"):
        if (end := getattr(assignment, key)) is not None:
            yield f"{key}: {_text(end)}"


def _text(choice: Choice | None) -> str:
    """The choice as a YAML value: ``NAME:KEY=VALUE,...``, or a mapping if that loses something."""
    if choice is None:
        return "null"
    label = choice.label
    plain = not any("," in str(value) for value in choice.options.values())
    if plain and Choice.parse(label).create().options == choice.create().options:
        return label if yaml.safe_load(label) == label else json.dumps(label)
    return json.dumps({"quantizer": choice.quantizer, "options": dict(choice.options)})
