"""``modulora bench``."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

from modulora_core.cli.arguments import Device, Quantizer, QuantizerOptions, option
from modulora_core.cli.terminal import Report, terminal


class Dtype(StrEnum):
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"


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
    list[Dtype],
    option(
        "--dtype DTYPE",
        "float32, bfloat16 or float16, of inputs and tiles. Repeatable.",
        default="float32 and bfloat16",
    ),
]
Seconds = Annotated[
    float, option("--seconds S", "Measure each row of the table for S seconds.", min=1e-9)
]


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
    from modulora_core.registry import create, find

    find(name)
    from modulora_conformance.bench.quantizer_bench import config_for, measure_quantizer
    from modulora_core.distributed import pick_device
    from modulora_core.options import parse_options

    quantizer = create(name, parse_options(option))
    config = config_for(
        quantizer,
        shape=shape,
        rows=rows,
        dtypes=dtype,
        device=pick_device(device),
        seconds=seconds,
    )
    with terminal().progress("measuring", "comparisons") as show:
        found = measure_quantizer(quantizer, config, show)
    return Report(found.to_json(), found.table())
