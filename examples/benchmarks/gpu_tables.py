"""The tables that ``gpu.py`` prints, as text that can stand in a document."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

MIB = 2**20

Checks = Sequence[Mapping[str, Any]]


def parity_table(parity: Mapping[str, Checks]) -> str:
    """A row for each quantizer, and below it one for each check that failed."""
    rows = []
    for name, checks in parity.items():
        tiles = [row for row in checks if row["check"] == "tile" and row["error"] is not None]
        to_the_bit = sum(row["error"] == 0 for row in tiles)
        worst = max(
            (
                row["error"] / row["limit"]
                for row in checks
                if row["error"] is not None and row["limit"]
            ),
            default=0.0,
        )
        passed = sum(row["passed"] for row in checks)
        rows.append(
            (name, f"{passed} of {len(checks)}", f"{to_the_bit} of {len(tiles)}", f"{worst:.2g}")
        )
    text = table(("", "passed", "tiles to the bit", "worst error / its limit"), rows)
    for name, checks in parity.items():
        for row in checks:
            if not row["passed"]:
                found = row["reason"] or f"error {row['error']:.3g}, limit {row['limit']:.3g}"
                text += f"\n{name}: {row['check']}, {row['shape']}, {row['dtype']}: {found}"
    return text


def layer_table(layers: Mapping[str, Mapping[str, Any]]) -> str:
    """A row for each quantizer and dtype."""
    rows = []
    for name, bench in layers.items():
        for dtype in dict.fromkeys(row["dtype"] for row in bench["comparisons"]):
            found = {
                (row["kind"], row["rows"]): row
                for row in bench["comparisons"]
                if row["dtype"] == dtype
            }
            decode = found["decode", None]
            cells = [
                name,
                "x".join(map(str, bench["shape"])),
                f"{bench['bits_per_weight']:.2f}",
                dtype,
            ]
            cells += [
                f"{decode['bytes_per_second'] / 1e9:.0f}",
                f"{100 * decode['share_of_copy']:.0f} %",
            ]
            for n in (1, 16, 512):
                cells += [f"{found[kind, n]['ratio']:.2f}" for kind in ("forward", "transposed")]
            rows.append((*cells, f"{found['lora_step', 512]['ratio']:.2f}"))
    heading = ["", "shape", "bits", "dtype", "decode GB/s", "of copy"]
    heading += [f"{way}, {n}" for n in (1, 16, 512) for way in ("x Ŵᵀ", "y Ŵ")]
    return table((*heading, "LoRA step"), rows)


def model_table(models: Mapping[str, Mapping[str, Any]], dense: str) -> str:
    """A row for each method; ratios are to the dense one, where that was measured."""
    base = models.get(dense)
    rows = []
    for name, found in models.items():
        step, peak, rate = (
            found["step"]["seconds"],
            found["peak_memory_bytes"],
            found["tokens_per_second"],
        )
        ratios = ("", "", "")
        if base is not None:
            ratios = (f"{step / base['step']['seconds']:.2f}", f"{peak / max(1, base['peak_memory_bytes']):.2f}",
                      f"{rate / base['tokens_per_second']:.2f}")  # fmt: skip
        rows.append(
            (
                name,
                f"{1e3 * step:.1f}",
                ratios[0],
                f"{peak / MIB:.0f}",
                ratios[1],
                f"{rate:.1f}",
                ratios[2],
            )
        )
    return table(("", "step ms", "x dense", "peak MiB", "x dense", "tokens/s", "x dense"), rows)


def table(heading: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Columns of equal width, the first to the left; empty without rows."""
    lines = [tuple(heading), *(tuple(row) for row in rows)]
    if len(lines) == 1:
        return ""
    widths = [max(len(line[i]) for line in lines) for i in range(len(heading))]
    return "\n".join(
        "  ".join(cell.rjust(width) if i else cell.ljust(width) for i, (cell, width) in enumerate(zip(line, widths, strict=True))).rstrip()
        for line in lines
    )  # fmt: skip
