"""What went where in a mixed checkpoint, as tables: for ``quantize``, which knows errors, and for ``info``, which doesn't."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import groupby
from typing import TYPE_CHECKING, Any

from modulora_core.cli.sizes import format_size

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table


def with_allocation(text: str, allocation: Mapping[str, Any] | None) -> RenderableType:
    """``text``, and under it what each choice got, which layers these are, and a sentence.

    Args:
        allocation: of :attr:`modulora_core.quantization.quantize.QuantizeResult.allocation`, or of
            :func:`modulora_core.quantization.mixed.recorded.recorded_allocation`; None: only ``text``.
    """
    if allocation is None:
        return text
    from rich.console import Group
    from rich.text import Text

    # as they are, without markup
    head, between, last = Text(text), Text(""), Text(f"\n{_summary(allocation)}")
    return Group(head, between, _choices(allocation), between, _layers(allocation["layers"]), last)


def _choices(allocation: Mapping[str, Any]) -> Table:
    """A row for each choice, then one for each end that is packed."""
    measured = "error" in allocation
    told = ("error", "everywhere: checkpoint", "error") if measured else ()
    table = _table("", "choice", "layers", "weights", "size", "bits", *told)
    for number, choice in enumerate(allocation["choices"], 1):
        errors = [
            f"{choice['error']:.4f}",
            format_size(choice["uniform_bytes"]),
            f"{choice['uniform_error']:.4f}",
        ] if measured else []  # fmt: skip
        table.add_row(str(number), choice["name"], str(choice["layers"]), *_sizes(choice), *errors)
    for name, end in allocation["ends"].items():
        table.add_row("", end["name"], name.removesuffix(".weight"), *_sizes(end))
    return table


def _sizes(row: Mapping[str, Any]) -> tuple[str, str, str]:
    bits = f"{8 * row['bytes'] / row['weights']:.2f}" if row["weights"] else ""
    return f"{row['weights']:,}", format_size(row["bytes"]), bits


def _layers(layers: Mapping[str, Mapping[str, Any]]) -> Table:
    """A row for each block, or for consecutive blocks that are alike: the number of each layer's choice."""
    blocks: dict[str, dict[str, str]] = {}
    for name in sorted(layers, key=lambda name: _place(_split(name)[0])):
        path, within = _split(name)
        blocks.setdefault(path, {})[within] = str(layers[name]["choice"] + 1)
    columns = list(dict.fromkeys(within for block in blocks.values() for within in block))
    table = _table("block", *(column.rpartition(".")[2] for column in columns))
    for block, alike in groupby(blocks, key=lambda path: blocks[path]):
        paths = list(alike)
        first, last = paths[0], paths[-1].rpartition(".")[2]
        table.add_row(
            first if len(paths) == 1 else f"{first} to {last}",
            *(block.get(column, "") for column in columns),
        )
    return table


def _split(name: str) -> tuple[str, str]:
    """A parameter's block, whose path ends with the first number in its name, and the module within."""
    parts = name.removesuffix(".weight").split(".")
    place = next((i for i, part in enumerate(parts) if part.isdigit()), 0)
    return ".".join(parts[: place + 1]), ".".join(parts[place + 1 :])


def _place(path: str) -> tuple[str, int]:
    """Block 10 after block 9: config.json has its keys sorted as text."""
    before, _, number = path.rpartition(".")
    return (before, int(number)) if number.isdigit() else (path, -1)


def _summary(allocation: Mapping[str, Any]) -> str:
    packed, ends, kept = (allocation[f"{part}_bytes"] for part in ("packed", "ends", "kept"))
    of_ends = f"{format_size(ends)} head and embedding, " if allocation["ends"] else ""
    used, budget = format_size(packed + ends + kept), format_size(allocation["budget"])
    lines = [
        f"{used} of a budget of {budget} used: {format_size(packed)} packed layers, {of_ends}{format_size(kept)} stays dense"
    ]
    if "error" in allocation:
        lines.append(
            f"estimated growth of the loss: {allocation['error']:.4f} nats per token; no choice within the budget is below "
            f"{allocation['bound']:.4f}"
        )
        best = sum(min(layer["errors"]) for layer in allocation["layers"].values())
        if allocation["error"] <= best * (1 + 1e-9):
            lines.append("the budget is more than enough: every layer has its best choice")
    return "\n".join(lines)


def _table(*headings: str) -> Table:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for heading in headings:
        table.add_column(heading, no_wrap=True)
    return table
