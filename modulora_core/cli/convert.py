"""``modulora convert``."""

from __future__ import annotations

from typing import Annotated

import typer

from modulora_core.cli.arguments import MaxShardSize, Out, Revision
from modulora_core.cli.sizes import format_size
from modulora_core.cli.terminal import Report, terminal

Source = Annotated[
    str,
    typer.Argument(metavar="SOURCE", show_default=False, help="A packed checkpoint, of modulora or of another tool: a "
                   "folder or a Hub id."),
]  # fmt: skip
To = Annotated[
    str,
    typer.Option("--to", metavar="FORMAT", show_default=False,
                 help="modulora, or a format that an installed quantizer brings."),
]  # fmt: skip


def command(
    source: Source,
    out: Out,
    to: To,
    max_shard_size: MaxShardSize = 5 * 10**9,
    revision: Revision = None,
) -> Report:
    """Rewrite a packed checkpoint in another format, a layer at a time.

    Between our checkpoints and those of other tools, for which a quantizer's plugin brings the format. Weights keep
    their values; nothing is quantized again. What the format can't hold is refused by name before anything is
    written. Finetuning doesn't need it: a folder of a format that can be read is a MODEL as it is.

    Examples:
      modulora convert org/quantized-model ours --to modulora
      modulora convert ours theirs --to FORMAT
    """
    from modulora_core.checkpoints.convert import convert

    with terminal().progress("converting", unit="parameters") as bar:
        result = convert(
            source, out, to, max_shard_bytes=max_shard_size, revision=revision,
            progress=lambda what, done, total: bar.update(done, total, what),
        )  # fmt: skip
    text = (f"{result.out}: {result.weights:,} packed weights from {result.source_format} to {result.format}, "
            f"{format_size(result.bytes)} on disk in all\n"
            f"{result.seconds:.1f} s, peak memory {format_size(result.peak_memory_bytes)}")  # fmt: skip
    return Report(result.to_json(), text)
