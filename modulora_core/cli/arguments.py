"""The arguments and options that several commands share, each declared once."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from modulora_core.cli.text import parse_size

if TYPE_CHECKING:
    from modulora_core.registry import Choice


LARGEST = 2**32 - 1
"""The largest count: torch and NumPy fail on more."""


def argument(metavar: str, help: str) -> Any:
    """Declare a positional argument."""
    return typer.Argument(metavar=metavar, help=help)


def option(words: str, help: str, *, default: str | None = None, **more: Any) -> Any:
    """Declare an option.

    Args:
        words: the flags and the value's name as in the help: ``"--option -o KEY=VALUE"``.
        default: describes the default in the help, if its value doesn't.
        more: further arguments of ``typer.Option``.
    """
    flags = [word for word in words.split() if word.startswith("-")]
    metavar = " ".join(words.split()[len(flags) :]) or None
    if "min" in more:
        more.setdefault("max", LARGEST)
    return typer.Option(*flags, metavar=metavar, help=help, show_default=default or True, **more)


def parse_choice(text: str | None, flag: str) -> Choice | None:
    """Read ``NAME[:KEY=VALUE,...]`` of an option. Raises OptionError for any other text."""
    from modulora_core.registry import Choice

    return None if text is None else Choice.parse(text, flag)


def to_bytes(value: str | int) -> int:
    """Read a SIZE, such as 24GiB. Raises BadParameter."""
    if isinstance(value, int):  # a default
        return value
    try:
        size = parse_size(value)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    if size < 1024:  # a number without its unit
        raise typer.BadParameter(f"expected a size such as 24GiB or 800MB, got {value}")
    return size


Model = Annotated[
    str,
    argument("MODEL", "A Hub id, a folder, a plugin's file, or package:NAME (installed)."),
]
Out = Annotated[Path, argument("OUT", "The folder to write: new or empty, except with --resume.")]
Quantizer = Annotated[str, argument("NAME", "A quantizer of `modulora list-quantizers`.")]
QuantizerOptions = Annotated[
    list[str], option("--option -o KEY=VALUE", "Set an option of the quantizer. Repeatable.")
]
Head = Annotated[
    str | None, option("--quantize-head NAME[:KEY=VALUE,...]", "Pack the output head too.")
]
Embeddings = Annotated[
    str | None,
    option(
        "--quantize-embeddings NAME[:KEY=VALUE,...]",
        "Pack the input embedding too. In a tied model it is also the output head.",
    ),
]
MemoryBudget = Annotated[
    int | None,
    option("--budget SIZE", "Memory that training may take, such as 24GiB.", parser=to_bytes),
]
MaxShardSize = Annotated[
    int, option("--max-shard-size SIZE", "Largest weight file.", parser=to_bytes, default="5GB")
]
Revision = Annotated[str | None, option("--revision REV", "Branch, tag or commit on the Hub.")]
Adapter = Annotated[str | None, option("--adapter ADAPTER", "LoRA adapter: a folder or a Hub id.")]
Device = Annotated[
    str | None,
    option("--device DEVICE", "cpu, cuda, cuda:1, mps.", default="a GPU if there is one"),
]
Dtype = Annotated[
    str,
    option(
        "--dtype DTYPE",
        "Dtype of activations: float32, bfloat16, float16; auto: float32 on a CPU, else bfloat16.",
    ),
]
Mapped = Annotated[
    bool, option("--mapped", "Map packed weights from disk, one decoder block at a time. CPU only.")
]
ParityCheck = Annotated[
    bool,
    option(
        "--parity-check/--no-parity-check",
        "On a GPU, compare the kernels of each kind of layer with plain torch.",
    ),
]
MaxNewTokens = Annotated[int, option("--max-new-tokens N", "Stop an answer after N tokens.")]
Temperature = Annotated[
    float, option("--temperature T", "0 takes the likeliest token; higher varies more.")
]
TopP = Annotated[float, option("--top-p P", "Sample from the likeliest tokens that sum to P.")]
TopK = Annotated[int, option("--top-k K", "Sample from the K likeliest tokens; 0 is all.")]
RepetitionPenalty = Annotated[
    float, option("--repetition-penalty F", "Above 1 makes repeated tokens less likely.")
]
Seed = Annotated[int, option("--seed N", "Seed of all random choices.", min=0)]
Resume = Annotated[bool, option("--resume", "Continue an interrupted run.")]
