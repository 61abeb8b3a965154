"""The arguments and options that several commands share, each declared once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from modulora_core.cli.sizes import parse_size


def _size(text: str) -> int:
    try:
        return parse_size(text)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


def _positive_size(value: str | int) -> int:
    size = value if isinstance(value, int) else _size(value)
    if size < 1:
        raise typer.BadParameter(f"expected more than 0, got {value}")
    return size


Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        show_default=False,
        help="A Hub id, a folder, a .gguf file, or package:NAME (the .gguf inside an installed package).",
    ),
]

Out = Annotated[
    Path,
    typer.Argument(
        metavar="OUT", show_default=False, help="The folder to write; new, or of the same work."
    ),
]

QuantizerName = Annotated[
    str,
    typer.Option(
        "--quantizer",
        "-q",
        metavar="NAME",
        show_default=False,
        help="One of `modulora list-quantizers`.",
    ),
]

QuantizerOptions = Annotated[
    list[str],
    typer.Option(
        "--option",
        "-o",
        metavar="KEY=VALUE",
        show_default=False,
        help="An option of the quantizer; repeat for more.",
    ),
]
"""For :func:`modulora_core.options.parse_options`."""

Data = Annotated[
    str,
    typer.Option(
        "--data",
        metavar="SOURCE",
        show_default=False,
        help="A file (.txt .jsonl .json .csv .parquet), a Hub dataset, or pydoc (text that Python ships).",
    ),
]

Adapter = Annotated[
    str | None,
    typer.Option(
        "--adapter",
        metavar="ADAPTER",
        show_default=False,
        help="A LoRA adapter: a folder or Hub id.",
    ),
]

Device = Annotated[
    str | None,
    typer.Option(
        "--device",
        metavar="DEVICE",
        show_default="an accelerator if there is one",
        help="cpu, cuda, cuda:1, mps.",
    ),
]

Dtype = Annotated[
    str,
    typer.Option(
        "--dtype",
        metavar="DTYPE",
        help="Of the activations: auto (float32 on a CPU, else bfloat16), float32, bfloat16, float16.",
    ),
]

Revision = Annotated[
    str | None,
    typer.Option(
        "--revision",
        metavar="REV",
        show_default=False,
        help="A branch, tag or commit of a Hub model.",
    ),
]

Mapped = Annotated[
    bool,
    typer.Option(
        "--mapped",
        help="Leave packed weights in their files, one decoder block in memory at a time. On a CPU.",
    ),
]

MaxNewTokens = Annotated[
    int, typer.Option("--max-new-tokens", metavar="N", help="The longest answer.")
]
Temperature = Annotated[
    float, typer.Option("--temperature", metavar="T", help="0 is greedy; higher is more varied.")
]
TopP = Annotated[
    float,
    typer.Option("--top-p", metavar="P", help="Sample from the likeliest tokens up to this share."),
]
TopK = Annotated[
    int, typer.Option("--top-k", metavar="K", help="Sample from the K likeliest tokens; 0 is all.")
]
RepetitionPenalty = Annotated[
    float,
    typer.Option(
        "--repetition-penalty", metavar="F", help="Above 1 makes repeated tokens less likely."
    ),
]

Seed = Annotated[
    int, typer.Option("--seed", metavar="N", min=0, help="The seed of every random choice.")
]

Resume = Annotated[bool, typer.Option("--resume", help="Go on with work that was interrupted.")]

ByteSize = Annotated[
    int | None,
    typer.Option(
        "--budget",
        metavar="SIZE",
        parser=_size,
        show_default=False,
        help="Bytes, such as 24GiB or 800MB.",
    ),
]

MaxShardSize = Annotated[
    int,
    typer.Option(
        "--max-shard-size",
        metavar="SIZE",
        parser=_positive_size,
        show_default="5GB",
        help="The largest weight file.",
    ),
]

Json = Annotated[
    bool, typer.Option("--json", help="Print one JSON object on stdout, and nothing else there.")
]
"""Added to every command by :mod:`modulora_core.cli.app`, as is :data:`Debug`."""

Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
