"""``modulora merge``."""

from __future__ import annotations

from typing import Annotated

import typer

from modulora_core.cli.arguments import Adapter, Model, Out
from modulora_core.cli.counted import counted
from modulora_core.cli.sizes import format_size
from modulora_core.cli.terminal import Report, terminal

MergedDtype = Annotated[
    str, typer.Option("--dtype", metavar="DTYPE", help="float16, bfloat16 or float32.")
]


def command(
    model: Model, out: Out, adapter: Adapter = None, dtype: MergedDtype = "bfloat16"
) -> Report:
    """Unpack a model, with an adapter merged in, to a folder that plain transformers loads.

    W = Ŵ + s·B·A, one parameter at a time. Without an adapter the packed weights are only unpacked.

    Examples:
      modulora merge smollm2-packed merged --adapter my-adapter
      modulora merge smollm2-packed unpacked --dtype float32
    """
    from modulora_core.adapters.merge import merge

    with terminal().progress("merging", unit="parameters") as bar:
        result = merge(
            model,
            out,
            adapter=adapter,
            dtype=dtype,
            progress=lambda what, done, total: bar.update(done, total, what),
        )
    text = (f"{result.out}: {format_size(result.bytes)} of {result.dtype}, {counted(result.adapted, 'module')} with an adapter merged in\n"
            f"{result.seconds:.1f} s, peak memory {format_size(result.peak_memory_bytes)}")  # fmt: skip
    return Report(result.to_json(), text)
