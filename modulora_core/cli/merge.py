"""``modulora merge``."""

from __future__ import annotations

import logging
import shlex
from pathlib import Path
from typing import Annotated, Any

from modulora_core.cli.arguments import Adapter, Model, argument, option
from modulora_core.cli.terminal import Report, terminal
from modulora_core.cli.text import facts, next_commands
from modulora_core.errors import OptionError

SEQ_LEN = 256
"""Tokens of a segment, if the model takes so many."""

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
Data = Annotated[str | None, option("--data SOURCE", "Text for the comparison.", default="pydoc")]
Segments = Annotated[
    int | None,
    option(
        "--segments N",
        f"Segments of {SEQ_LEN} tokens to compare; 0 compares nothing.",
        min=0,
        default="8",
    ),
]


def command(
    model: Model,
    out: Out,
    adapter: Adapter = None,
    dtype: Dtype = None,
    type: Type = None,
    base: Base = None,
    data: Data = None,
    segments: Segments = None,
) -> Report:
    """Dequantize a packed model and add an adapter to its weights.

    It writes W = Ŵ + s·B·A, one parameter at a time, to a folder that transformers loads without
    modulora. Without an adapter it only dequantizes.

    If OUT has the suffix of a plugin's file format, it becomes one file, quantized again. Weights
    that the adapter doesn't change stay as they are if MODEL is such a file. The command then
    compares the file with the model and its adapter, by KL divergence and perplexity on a text.

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
        found = _to_file(model, out, adapter, type, base, data or "pydoc", segments)
        return Report(found, facts({key: found[key] for key in found if key != "retained"}))
    suffixes = ", *".join(file_suffixes())
    for flag, value in {"type": type, "base": base, "data": data, "segments": segments}.items():
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
    model: str,
    out: Path,
    adapter: str | None,
    type: str | None,
    base: str | None,
    data: str,
    segments: int | None,
) -> dict[str, Any]:
    from modulora_core.checkpoints.foreign.writers import file_writer
    from modulora_core.data import token_segments
    from modulora_core.inference.divergence import divergence
    from modulora_core.inference.opened import open_to_run

    writer = file_writer(out)
    segments = 8 if segments is None else segments
    if segments:  # bad data is refused before the work
        before = open_to_run(model, adapter=adapter)
        seq_len = min(SEQ_LEN, before.window or SEQ_LEN)
        ids = token_segments(data, before.tokenizer, seq_len, segments)
    with terminal().progress("merging", "tensors") as show:
        merged = writer.merge(model, out, adapter=adapter, type=type, base=base, progress=show)
    found = merged.to_json()
    if segments:
        with terminal().progress("comparing", "segments") as show:
            compared = divergence(before, open_to_run(str(out)), ids, progress=show)
        if compared.is_lost:
            logging.getLogger(__name__).warning(
                "%s: its KL divergence to the adapter's predictions, %.3g, is more than half of "
                "the adapter's own effect, %.3g; choose a type of more bits than %s",
                out, compared.kl_divergence, compared.kl_of_adapter, type or writer.default_type,
            )  # fmt: skip
        found |= compared.to_json()
    return found
