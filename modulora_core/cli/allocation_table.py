"""What went where in a mixed checkpoint, as tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any

from modulora_core.cli.sizes import format_size

if TYPE_CHECKING:
    from rich.table import Table


def allocation_tables(allocation: Mapping[str, Any]) -> tuple[Table, Table, str]:
    """From :attr:`modulora_core.quantize.QuantizeResult.allocation`: what each choice got, which layers these are, and a sentence."""
    return _choices(allocation["choices"]), _layers(allocation["layers"]), _summary(allocation)


def _choices(choices: Sequence[Mapping[str, Any]]) -> Table:
    table = _table(
        "", "choice", "layers", "weights", "size", "bits", "error", "everywhere: checkpoint", "error"
    )
    for number, choice in enumerate(choices, 1):
        bits = f"{8 * choice['bytes'] / choice['weights']:.2f}" if choice["weights"] else ""
        table.add_row(
            str(number), choice["name"], str(choice["layers"]), f"{choice['weights']:,}", format_size(choice["bytes"]), bits,
            f"{choice['error']:.4f}", format_size(choice["uniform_bytes"]), f"{choice['uniform_error']:.4f}",
        )  # fmt: skip
    return table


def _layers(layers: Mapping[str, Mapping[str, Any]]) -> Table:
    """A row for each block, or for consecutive blocks that are alike: the number of each layer's choice."""
    blocks: dict[str, dict[str, str]] = {}
    for name, layer in layers.items():
        path, within = _split(name)
        blocks.setdefault(path, {})[within] = str(layer["choice"] + 1)
    columns = list(dict.fromkeys(within for block in blocks.values() for within in block))
    table = _table("block", *(column.rpartition(".")[2] for column in columns))
    for block, alike in groupby(blocks, key=lambda path: blocks[path]):
        paths = list(alike)
        first, last = paths[0], paths[-1].rpartition(".")[2]
        table.add_row(
            first if len(paths) == 1 else f"{first} to {last}", *(block.get(column, "") for column in columns)
        )
    return table


def _split(name: str) -> tuple[str, str]:
    """A parameter's block, whose path ends with the first number in its name, and the module within."""
    parts = name.removesuffix(".weight").split(".")
    place = next((i for i, part in enumerate(parts) if part.isdigit()), 0)
    return ".".join(parts[: place + 1]), ".".join(parts[place + 1 :])


def _summary(allocation: Mapping[str, Any]) -> str:
    used = allocation["kept_bytes"] + allocation["packed_bytes"]
    budget = allocation["budget"]
    lines = [
        f"{format_size(used)} of a budget of {format_size(budget)} used: {format_size(allocation['packed_bytes'])} packed, "
        f"{format_size(allocation['kept_bytes'])} stays dense",
        f"estimated growth of the loss: {allocation['error']:.4f} nats per token; no choice within the budget is below "
        f"{allocation['bound']:.4f}",
    ]
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
