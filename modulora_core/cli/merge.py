"""``modulora merge``."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

from modulora_core.cli.arguments import Adapter, Model, argument, option
from modulora_core.cli.terminal import Report, terminal
from modulora_core.cli.text import facts, next_commands
from modulora_core.errors import OptionError

Out = Annotated[Path, argument("OUT", "The folder to write, new or empty, or a new file.")]
Dtype = Annotated[
    str | None,
    option("--dtype DTYPE", "Dtype of weights: float16, bfloat16, float32.", default="bfloat16"),
]
Type = Annotated[
    str | None,
    option(
        "--type TYPE",
        "Type of changed weights in a file, by its name in the format.",
        default="the format's",
    ),
]
Base = Annotated[
    str | None,
    option(
        "--base FILE", "A file of the same model, for metadata and tokenizer.", default="MODEL's"
    ),
]


def command(
    model: Model,
    out: Out,
    adapter: Adapter = None,
    dtype: Dtype = None,
    type: Type = None,
    base: Base = None,
) -> Report:
    """Dequantize a packed model and add an adapter to its weights.

    It writes W = Ŵ + s·B·A, one parameter at a time, to a folder that transformers loads without
    modulora. Without an adapter it only dequantizes.

    If OUT has the suffix of a plugin's file format, it becomes one file, quantized again. Weights
    that the adapter doesn't change stay as they are if MODEL is such a file. A type of few bits
    loses small updates: `evaluate MODEL --adapter ADAPTER --against OUT` says how much is left.

    Examples:
        modulora merge smollm2-packed merged --adapter my-adapter
        modulora merge smollm2-packed unpacked --dtype float32
        modulora merge MODEL.SUFFIX OUT.SUFFIX --adapter my-adapter --type TYPE
    """
    from modulora_core.checkpoints.outputs import check_new_file, check_output
    from modulora_core.models.installed_formats import file_suffixes

    if out.suffix.lower() in file_suffixes():
        if dtype is not None:
            raise OptionError(f"--dtype: expected --type beside {out}, whose weights are packed")
        check_new_file(out, out.suffix.lower())  # before torch is imported
        return _to_file(model, out, adapter, type, base)
    suffixes = ", *".join(file_suffixes())
    for flag, value in {"type": type, "base": base}.items():
        if value is not None:
            raise OptionError(
                f"--{flag}: expected OUT to be a file *{suffixes} beside it, got {out}"
            )
    check_output(out)
    from rich.console import Group

    from modulora_core.hf.merge import merge

    with terminal().progress("merging", "parameters") as show:
        result = merge(model, out, adapter=adapter, dtype=dtype or "bfloat16", progress=show)
    following = () if result.task else [next_commands(f"modulora evaluate {shlex.quote(str(out))}")]
    return Report(result.to_json(), Group(facts(result.to_json()), *following))


def _to_file(
    model: str, out: Path, adapter: str | None, type: str | None, base: str | None
) -> Report:
    from rich.console import Group

    from modulora_core.checkpoints.foreign.writers import file_writer

    with terminal().progress("merging", "tensors") as show:
        merged = file_writer(out).merge(
            model, out, adapter=adapter, type=type, base=base, progress=show
        )
    found = merged.to_json()
    beside = "" if adapter is None else f" --adapter {shlex.quote(adapter)}"
    following = next_commands(
        f"modulora evaluate {shlex.quote(model)}{beside} --against {shlex.quote(str(out))}"
        " --segments 8"
    )
    shown = facts({key: found[key] for key in found if key != "retained"})
    return Report(found, Group(shown, following))
