"""Holds the comparisons of ``modulora bench``, as JSON and as a table."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from modulora_conformance.bench.timing import Timing, device_name
from modulora_core.spec import Quantizer

if TYPE_CHECKING:
    from rich.console import RenderableType

RANK = 8

LABELS = {
    "pack": "pack",
    "decode": "decode",
    "forward": "x Ŵᵀ",
    "transposed": "y Ŵ",
    "lora_step": "LoRA step",
}

NOISY = 1.3
"""The table warns if a median is more than this many times its best."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """One measurement: the quantizer and the dense way in the same turns.

    Attributes:
        kind: as :mod:`modulora_conformance.bench.quantizer_bench` lists them.
        dtype: of the input or the tiles.
        rows: of the input; None for ``pack`` and ``decode``.
        ours: the quantizer's times.
        dense: the dense way's times.
        moved: bytes that the quantizer reads and writes, and the dense way; None for products.
    """

    kind: str
    dtype: str
    rows: int | None
    ours: Timing
    dense: Timing
    moved: tuple[int, int] | None = None

    @property
    def ratio(self) -> float:
        """The quantizer's time divided by the dense way's: below 1 it is faster."""
        return self.ours.beside(self.dense)

    @property
    def noise(self) -> float:
        """The worse noise of the two timings."""
        return max(self.ours.noise, self.dense.noise)

    def to_json(self) -> dict[str, Any]:
        found: dict[str, Any] = {"kind": self.kind, "dtype": self.dtype, "rows": self.rows}
        found |= {"ratio": self.ratio, "ours": self.ours.to_json(), "dense": self.dense.to_json()}
        if self.moved:
            found["bytes_per_second"] = self.moved[0] / self.ours.seconds
            found["share_of_copy"] = self.moved[0] / self.moved[1] / self.ratio
        return found

    def cells(self) -> tuple[str, ...]:
        """A row of the table."""
        found = self.to_json()
        return (
            LABELS[self.kind],
            self.dtype,
            str(self.rows or ""),
            f"{1e3 * self.ours.seconds:.3f}",
            f"{1e3 * self.dense.seconds:.3f}",
            f"{self.ratio:.2f}",
            f"{found['bytes_per_second'] / 1e9:.3g}" if self.moved else "",
            f"{100 * found['share_of_copy']:.3g} %" if self.moved else "",
        )


@dataclass(frozen=True, slots=True)
class Bench:
    """The comparisons of one quantizer with its options, for a weight ``[out, in]``."""

    quantizer: Quantizer
    shape: tuple[int, int]
    device: torch.device
    bits_per_weight: float
    comparisons: tuple[Comparison, ...]

    def to_json(self) -> dict[str, Any]:
        """The object of ``modulora bench --json``: seconds, bytes a second, ratios ours / dense."""
        return {
            "quantizer": self.quantizer.spec.name,
            "options": self.quantizer.options.model_dump(mode="json"),
            "shape": list(self.shape),
            "device": str(self.device),
            "device_name": device_name(self.device),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "rank": RANK,
            "bits_per_weight": self.bits_per_weight,
            "noise": max(row.noise for row in self.comparisons),
            "comparisons": [row.to_json() for row in self.comparisons],
        }

    def table(self) -> RenderableType:
        """The output of ``modulora bench`` for a terminal."""
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        facts, (out_features, in_features) = self.to_json(), self.shape
        options = ", ".join(f"{key}={value}" for key, value in facts["options"].items())
        name = f"{facts['quantizer']} ({options})" if options else facts["quantizer"]
        head = (
            f"{name}, {out_features} x {in_features}, {self.bits_per_weight:.3f} bits per weight\n"
            f"{facts['device_name']}, {facts['threads']} threads, torch {facts['torch']}"
        )
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
        for heading in ("", "dtype", "rows", "ms", "dense ms", "× dense", "GB/s", "of copy"):
            left = heading in ("", "dtype")
            table.add_column(heading, justify="left" if left else "right", no_wrap=True)
        for row in self.comparisons:
            table.add_row(*row.cells())
        notes = (
            "Milliseconds are medians of the turns. A ratio below 1 is faster than dense. "
            "GB/s count all bytes read and written."
        )
        if facts["noise"] > NOISY:
            notes += (
                f"\nThe machine is busy: a median was {facts['noise']:.1f} times its best. "
                "Ratios are steadier than times; --seconds makes both steadier."
            )
        return Group(Text(head), table, Text(notes))
