"""``modulora bench``."""

from __future__ import annotations

import importlib
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any

from modulora_core.cli.arguments import Device, Quantizer, QuantizerOptions, option
from modulora_core.cli.conformance import KIT, check_kit
from modulora_core.cli.terminal import Report, terminal
from modulora_core.cli.text import table
from modulora_core.errors import OptionError

if TYPE_CHECKING:
    from rich.console import RenderableType

NOISY = 1.3
"""From this ratio of a median to its best time on, the report says that the machine is busy."""

Shape = Annotated[
    str | None,
    option("--shape OUTxIN", "Shape of the weight.", default="2048x2048, or the next it takes"),
]
Rows = Annotated[
    list[int],
    option(
        "--rows N",
        "Rows of the input; the LoRA step takes the largest. Repeatable.",
        min=1,
        default="1, 16 and 512",
    ),
]
Dtypes = Annotated[
    list[str],
    option(
        "--dtype DTYPE",
        "float32, bfloat16 or float16, of inputs and tiles. Repeatable.",
        default="float32 and bfloat16",
    ),
]
Seconds = Annotated[float, option("--seconds S", "Measure each row of the table for S seconds.")]


def command(
    name: Quantizer,
    option: QuantizerOptions = [],
    shape: Shape = None,
    rows: Rows = [],
    dtype: Dtypes = [],
    device: Device = None,
    seconds: Seconds = 1.0,
) -> Report:
    """Measure a quantizer's speed on this machine, relative to a dense layer.

    It measures packing, decoding, products with few and many rows in both directions, and the
    forward and backward of a LoRA layer. Packing and decoding are compared with a copy. Both sides
    take turns, and the operands come from memory, not from a cache.

    Examples:
        modulora bench NAME
        modulora bench NAME -o bits=3 --shape 4096x4096 --rows 1 --rows 2048
        modulora bench NAME --device cuda --dtype bfloat16 --json
    """
    from modulora_core.devices import pick_device
    from modulora_core.options import parse_options
    from modulora_core.registry import create

    check_kit("bench")
    kit = importlib.import_module(f"{KIT}.bench.quantizer_bench")
    quantizer = create(name, parse_options(option))
    config = kit.BenchConfig(device=pick_device(device), seconds=seconds)
    wanted = quantizer.spec.next_shape(config.shape) if shape is None else _shape(shape)
    config = replace(config, shape=wanted)
    config = replace(config, rows=tuple(rows)) if rows else config
    config = replace(config, dtypes=tuple(dtype)) if dtype else config
    with terminal().progress("measuring", "comparisons") as show:
        found = kit.measure_quantizer(
            quantizer, config, progress=lambda done, total, what: show(what, done, total)
        ).to_json()
    return Report(found, _text(found))


def _shape(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)[x×](\d+)", text.strip())
    if match is None:
        raise OptionError(f"--shape: expected OUTxIN, such as 4096x11008, got {text!r}")
    return int(match[1]), int(match[2])


def _text(found: Mapping[str, Any]) -> RenderableType:
    from rich.console import Group
    from rich.text import Text

    options = ", ".join(f"{key}={value}" for key, value in found["options"].items())
    name = f"{found['quantizer']} ({options})" if options else found["quantizer"]
    out_features, in_features = found["shape"]
    head = (
        f"{name}, {out_features} x {in_features}, {found['bits_per_weight']:.3f} bits per weight\n"
        f"{found['device_name']}, {found['threads']} threads, torch {found['torch']}"
    )
    notes = (
        "Milliseconds are medians of the turns. A ratio below 1 is faster than dense. "
        "GB/s count all bytes read and written."
    )
    if found["noise"] > NOISY:
        notes += (
            f"\nThe machine is busy: a median was {found['noise']:.1f} times its best. "
            "Ratios are steadier than times; --seconds makes both steadier."
        )
    headings = ("", "dtype", "rows", "ms", "dense ms", "× dense", "GB/s", "of copy")
    rows = map(_cells, found["comparisons"])
    return Group(Text(head), table(headings, rows, numbers=True), Text(notes))


KINDS = {"forward": "x Ŵᵀ", "transposed": "y Ŵ", "lora_step": "LoRA step"}


def _cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    moves = "share_of_copy" in row
    return (
        KINDS.get(row["kind"], row["kind"]),
        row["dtype"],
        str(row["rows"] or ""),
        f"{1e3 * row['ours']['seconds']:.3f}",
        f"{1e3 * row['dense']['seconds']:.3f}",
        f"{row['ratio']:.2f}",
        f"{row['bytes_per_second'] / 1e9:.3g}" if moves else "",
        f"{100 * row['share_of_copy']:.3g} %" if moves else "",
    )
