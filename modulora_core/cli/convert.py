"""``modulora convert``."""

from __future__ import annotations

from typing import Annotated

from modulora_core.cli.arguments import MaxShardSize, Out, Revision, argument, option
from modulora_core.cli.terminal import Report, terminal
from modulora_core.cli.text import facts

Source = Annotated[str, argument("SOURCE", "A packed checkpoint: a folder or a Hub id.")]
To = Annotated[str, option("--to FORMAT", "modulora, or a format of an installed quantizer.")]


def command(
    source: Source,
    out: Out,
    to: To,
    max_shard_size: MaxShardSize = 5 * 10**9,
    revision: Revision = None,
) -> Report:
    """Rewrite a packed checkpoint in another format, one layer at a time.

    It converts between our checkpoints and the formats that quantizer plugins read and write.
    Weights keep their values: nothing is quantized again. If the format can't hold a weight, the
    command names it and writes nothing. Finetuning doesn't need this command: `modulora finetune`
    takes every format that can be read.

    Examples:
        modulora convert org/quantized-model ours --to modulora
        modulora convert ours theirs --to FORMAT
    """
    from modulora_core.checkpoints.convert import convert

    with terminal().progress("converting", "parameters") as show:
        result = convert(
            source, out, to, max_shard_bytes=max_shard_size, revision=revision, progress=show
        )
    return Report(result.to_json(), facts(result.to_json()))
