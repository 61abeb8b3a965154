"""``modulora convert``."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

from modulora_core.cli.arguments import MaxShardSize, argument, option
from modulora_core.cli.terminal import Report, terminal
from modulora_core.cli.text import facts, next_commands
from modulora_core.errors import OptionError
from modulora_core.hookspecs import PROJECT

Source = Annotated[
    str, argument("SOURCE", "A packed checkpoint; or an adapter, if FORMAT has adapters.")
]
Out = Annotated[Path, argument("OUT", "The folder to write, new or empty, or a new file.")]
To = Annotated[str, option("--to FORMAT", "modulora, or a format of an installed plugin.")]
Base = Annotated[
    str | None, option("--model MODEL", "The adapter's packed model, or its model's file.")
]


def command(
    source: Source, out: Out, to: To, model: Base = None, max_shard_size: MaxShardSize = 5 * 10**9
) -> Report:
    """Rewrite a packed checkpoint in another format, one layer at a time.

    It converts between our checkpoints and the formats that plugins read and write.
    Weights keep their values: nothing is quantized again. If the format can't hold a weight, the
    command names it and writes nothing. Finetuning doesn't need this command: `modulora finetune`
    takes every format that can be read.

    Other formats take an adapter. --to with a format of adapters rewrites it for another program,
    which may need --model, the packed model of the adapter. The name of a file format writes a LoRA
    file, for programs that load models from such files. --model is the file that they load; an
    adapter trained on that file needs none.

    Examples:
        modulora convert org/quantized-model ours --to modulora
        modulora convert ours theirs --to FORMAT
        modulora convert my-adapter theirs --to FORMAT --model smollm2-packed
        modulora convert my-adapter OUT.SUFFIX --to FORMAT --model MODEL.SUFFIX
    """
    from modulora_core.checkpoints.outputs import check_output
    from modulora_core.models.installed_formats import find

    # before torch is imported
    spec = None if to == PROJECT else find(to).spec
    if spec is None or not (spec.adapters or spec.file_suffix):
        check_output(out)
    from modulora_convert.convert import adapter_writer, convert

    writer = adapter_writer(to)
    if writer is not None:
        if max_shard_size != 5 * 10**9:
            raise OptionError(
                f"--max-shard-size: expected a --to that writes a model, got --to {to}"
            )
        written = writer.write_adapter(source, out, model=model).to_json()
        return Report(written, facts(written))
    if model is not None:
        raise OptionError(f"--model: expected a --to that writes an adapter, got --to {to}")
    from rich.console import Group

    with terminal().progress("converting", "parameters") as show:
        result = convert(source, out, to, max_shard_bytes=max_shard_size, progress=show)
    following = next_commands(f"modulora info {shlex.quote(str(out))}")
    return Report(result.to_json(), Group(facts(result.to_json()), following))
