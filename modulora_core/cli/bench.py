"""``modulora bench``."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any

import typer

from modulora_core.cli.arguments import Device, QuantizerOptions
from modulora_core.cli.kit import import_kit
from modulora_core.cli.terminal import Report, terminal

if TYPE_CHECKING:
    from rich.console import RenderableType


NOISY = 1.3
"""A median that is more than so many times its best is worth a word."""

Name = Annotated[
    str,
    typer.Argument(metavar="NAME", show_default=False, help="One of `modulora list-quantizers`."),
]
Shape = Annotated[
    str | None, typer.Option("--shape", metavar="OUTxIN", show_default="2048x2048, or the next that the quantizer takes",
                             help="Of the weight; larger ones are nearer to large models.")
]  # fmt: skip
Rows = Annotated[
    list[int],
    typer.Option("--rows", metavar="N", min=1, show_default="1, 16 and 512",
                 help="Rows of the inputs; repeat for more. The LoRA step takes the largest."),
]  # fmt: skip
Dtypes = Annotated[
    list[str],
    typer.Option("--dtype", metavar="DTYPE", show_default="float32 and bfloat16",
                 help="Of inputs and tiles: float32, bfloat16, float16; repeat for more."),
]  # fmt: skip
Seconds = Annotated[
    float,
    typer.Option(
        "--seconds", metavar="S", help="For each comparison; more gives steadier medians."
    ),
]


def command(
    name: Name,
    option: QuantizerOptions = [],
    shape: Shape = None,
    rows: Rows = [],
    dtype: Dtypes = [],
    device: Device = None,
    seconds: Seconds = 1.0,
) -> Report:
    """Measure a quantizer on this machine, beside the dense layer.

    Packing and decoding are measured beside a copy; products by few and many rows, both ways, and the forward and backward of a
    LoRA layer beside those of a dense weight. The two sides take turns in one process, and medians are told. Weights
    rotate, so that they come from memory. On a CPU the dense side of products is in float32.

    Examples:
      modulora bench NAME
      modulora bench NAME -o bits=3 --shape 4096x4096 --rows 1 --rows 2048
      modulora bench NAME --device cuda --dtype bfloat16 --json
    """
    from modulora_core.devices import pick_device
    from modulora_core.options import parse_options
    from modulora_core.registry import create

    kit = import_kit("bench", "bench.quantizer_bench")

    quantizer = create(name, parse_options(option))
    config = kit.BenchConfig(device=pick_device(device), seconds=seconds)
    wanted = quantizer.spec.next_shape(config.shape) if shape is None else _shape(shape)
    config = replace(config, shape=wanted)
    if rows:
        config = replace(config, rows=tuple(rows))
    if dtype:
        config = replace(config, dtypes=tuple(dtype))
    with terminal().progress("measuring", unit="comparisons") as bar:
        found = kit.measure_quantizer(quantizer, config, progress=bar.update)
    return Report(found.to_json(), _told(found))


def _shape(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)[x×](\d+)", text.strip())
    if match is None:
        from modulora_core.errors import OptionError

        raise OptionError(f"--shape: expected OUTxIN, such as 4096x11008, got {text!r}")
    return int(match[1]), int(match[2])


def _told(found: Any) -> RenderableType:
    from rich.console import Group
    from rich.markup import escape

    facts = found.to_json()
    options = ", ".join(f"{key}={value}" for key, value in facts["options"].items())
    shape = "{} x {}".format(*facts["shape"])
    title = f"{facts['quantizer']} ({options})" if options else facts["quantizer"]
    lines = [f"{title}, {shape}, {found.bits_per_weight:.3f} bits per weight",
             f"{facts['device_name']}, {facts['threads']} threads, torch {facts['torch']}"]  # fmt: skip
    notes = ["Milliseconds are medians of turns; a ratio is the median over the turns, below 1 is faster than dense. GB/s and the share of "
             "the copy's count bytes read and written, packed and dense."]  # fmt: skip
    if found.noise > NOISY:
        notes.append(f"The machine is busy: a median was {found.noise:.1f} times its best. Ratios are steadier than times; "
                     "--seconds makes both more so.")  # fmt: skip
    return Group(escape("\n".join(lines)), _table(found), escape("\n".join(notes)))


def _table(found: Any) -> RenderableType:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column("")
    for heading in (
        "dtype",
        "rows",
        "ms",
        "dense ms",
        "× dense",
        "GB/s",
        "of copy",
        "noise",
        "turns",
    ):
        table.add_column(heading, justify="left" if heading == "dtype" else "right", no_wrap=True)
    for row in found.comparisons:
        table.add_row(*_cells(row))
    return table


def _cells(row: Any) -> tuple[str, ...]:
    names = {
        "pack": "pack",
        "decode": "decode",
        "forward": "x Ŵᵀ",
        "transposed": "y Ŵ",
        "lora_step": "LoRA step",
    }
    bandwidth = "" if row.bandwidth is None else f"{row.bandwidth / 1e9:.3g}"
    share = "" if row.share is None else f"{100 * row.share:.3g} %"
    noise = max(row.ours.noise, row.dense.noise)
    return (
        names[row.kind], row.dtype, "" if row.rows is None else str(row.rows),
        f"{1e3 * row.ours.seconds:.3f}", f"{1e3 * row.dense.seconds:.3f}", f"{row.ratio:.2f}",
        bandwidth, share, f"{noise:.2f}", str(len(row.ours.turns)),
    )  # fmt: skip
